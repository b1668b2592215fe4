// Runs a grid of CUDA threads as fibers, one block after another. Compiled without sanitizers, linked to kernels with.
//
// Checked here: that all threads of a block meet at the same __syncthreads, that all lanes of a mask meet at the same
// warp operation, that a shuffle reads only lanes that are there, and that no thread waits for ever. Shared memory is
// filled with NaNs (0xff) before each block. Threads and blocks run in a random order that the seed fixes.
//
// main() reads one launch from standard input and writes the buffers as the kernel leaves them:
//   kernel name \n blocks threads shared_bytes seed arguments \n, then for each argument a letter and its data:
//   b SIZE \n bytes (a buffer), i (4 bytes, int), f (4 bytes, float), n (a null pointer)
// Exit status 0, or 1 where a rule was broken, with one line for each on standard error.
#include <dlfcn.h>
#include <sys/mman.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#define IF_LINKED __attribute__((weak))
extern "C" {
// Where the shared variables stand, if there are any.
extern char __start_cudacpu_shared[] IF_LINKED, __stop_cudacpu_shared[] IF_LINKED;
// What the sanitizers want to know of fibers.
IF_LINKED void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
IF_LINKED void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
IF_LINKED void __asan_unpoison_memory_region(const volatile void* memory, size_t size);
IF_LINKED void* __tsan_get_current_fiber();
IF_LINKED void* __tsan_create_fiber(unsigned flags);
IF_LINKED void __tsan_destroy_fiber(void* fiber);
IF_LINKED void __tsan_switch_to_fiber(void* fiber, unsigned flags);
IF_LINKED void __tsan_acquire(void* point);
IF_LINKED void __tsan_release(void* point);

// Save the callee's registers on this stack, note the stack pointer in *save, and go on with the stack `load`.
void cudacpu_switch(void** save, void* load);
}
asm(R"(
.text
.globl cudacpu_switch
.type cudacpu_switch, @function
cudacpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size cudacpu_switch, .-cudacpu_switch
)");

namespace cudacpu {
typedef void (*Launch)(void** arguments);
std::map<std::string, Launch>& kernels() {
  static std::map<std::string, Launch> all;
  return all;
}

namespace {
enum State { READY, AT_BARRIER, AT_WARP, DONE };
const size_t STACK = 64 << 10;
const unsigned NO_SYNCHRONIZATION = 1;

struct Thread {
  State state;
  uint3 index;
  void* stack_pointer;
  char* stack;
  void* asan_stack;
  void* tsan_fiber;
  const void* site;  // the call at which it waits
  // The warp operation that it waits in: whose lanes meet, what it gives, which lane it reads, what it gets.
  unsigned mask;
  uint64_t given, received;
  int source;
  // What the thread sanitizer is told: whether the operation orders memory, and where its order is noted.
  bool orders;
  char released;
  char* ordered;
  int barriers;
};

std::vector<Thread> threads;
int current, alive, waiting;  // `waiting` at the barrier
const void* barrier_site;
char barrier_points[2], launch_end;
// Points where meetings are noted; each is used again only when all have long left the meeting.
char warp_points[1024];
int warp_meetings;
Launch kernel;
void** arguments;
char* stacks;
void* main_stack_pointer;
void* main_asan_stack;
const void* main_stack;
size_t main_stack_size;
void* main_fiber;
unsigned shared_bytes;
void* shared;
std::vector<void*> shared_memory;
uint64_t random_state;
int errors;

void error(const char* format, ...) {
  if (errors++ >= 10) return;
  va_list values;
  va_start(values, format);
  fprintf(stderr, "cudacpu: block %u: ", blockIdx.x);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  va_end(values);
}

std::string name(const void* site) {
  Dl_info info;
  char text[64];
  const bool known = dladdr(site, &info) && info.dli_sname;
  snprintf(text, sizeof text, "+%#zx", (size_t)site - (known ? (size_t)info.dli_saddr : 0));
  return (known ? info.dli_sname : "") + std::string(text);
}

uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

std::vector<int> shuffled(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (int i = count - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
  return order;
}

// Fill by stores that no sanitizer sees: memset would count as the kernel's access.
void fill(void* memory, size_t size) {
  volatile char* bytes = static_cast<volatile char*>(memory);
  for (size_t i = 0; i < size; i++) bytes[i] = (char)0xff;
}

// Make the thread sanitizer forget who used this memory: it does so for pages that are mapped anew.
void forget(char* begin, char* end) {
  if (!__tsan_create_fiber || begin == end) return;
  char* first = (char*)((size_t)begin & ~(size_t)4095);
  const size_t size = ((size_t)end + 4095 & ~(size_t)4095) - (size_t)first;
  std::vector<char> content(size);
  volatile char *from = first, *kept = content.data();
  for (size_t i = 0; i < size; i++) kept[i] = from[i];
  mmap(first, size, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (size_t i = 0; i < size; i++) from[i] = kept[i];
}

// ---- fibers

void to_main() {
  Thread& self = threads[current];
  const bool last = self.state == DONE;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last ? nullptr : &self.asan_stack, main_stack, main_stack_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_fiber, NO_SYNCHRONIZATION);
  cudacpu_switch(&self.stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(self.asan_stack, nullptr, nullptr);
}

void resume(int i) {
  Thread& thread = threads[current = i];
  threadIdx = thread.index;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&main_asan_stack, thread.stack, STACK);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(thread.tsan_fiber, NO_SYNCHRONIZATION);
  cudacpu_switch(&main_stack_pointer, thread.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(main_asan_stack, nullptr, nullptr);
}

// ---- where threads meet

void release_barrier() {
  for (Thread& thread : threads)
    if (thread.state == AT_BARRIER) thread.state = READY;
  waiting = 0;
  barrier_site = nullptr;
}

// What the lanes did before comes before what each does after it has acquired `point`. That is not what they released
// later: a fast lane may be at its next meeting before a slow one goes on from this.
void order_memory(int first, unsigned present, char* point) {
  if (!__tsan_acquire) return;
  for (int lane = 0; lane < 32; lane++)
    if (present >> lane & 1) __tsan_acquire(&threads[first + lane].released);
  __tsan_release(point);
}

// Complete the operation in which thread `i` waits, once all living lanes of its mask do. Every lane then has what its
// source gave.
void try_warp(int i) {
  const unsigned mask = threads[i].mask;
  const int first = i / 32 * 32;
  unsigned present = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1) || first + lane >= (int)threads.size()) continue;
    const Thread& thread = threads[first + lane];
    if (thread.state == DONE) continue;
    if (thread.state != AT_WARP || thread.mask != mask) return;
    present |= 1u << lane;
    if (thread.site != threads[i].site) {
      error("lanes of a warp meet at different operations, thread %d at %s and thread %d at %s", i,
            name(threads[i].site).c_str(), first + lane, name(thread.site).c_str());
      threads[i].site = thread.site;  // say it once
    }
  }
  char* point = &warp_points[warp_meetings++ % sizeof warp_points];
  if (threads[i].orders) order_memory(first, present, point);
  for (int lane = 0; lane < 32; lane++) {
    if (!(present >> lane & 1)) continue;
    Thread& thread = threads[first + lane];
    thread.ordered = point;
    if (!(present >> thread.source & 1))
      error("thread %d reads lane %d, which is not there, at %s", first + lane, thread.source,
            name(thread.site).c_str());
    else
      thread.received = threads[first + thread.source].given;
    thread.state = READY;
  }
}

// What a warp operation's lanes that were left behind wait for may have become true.
void on_exit() {
  const int first = current / 32 * 32;
  for (int i = first; i < std::min(first + 32, (int)threads.size()); i++)
    if (threads[i].state == AT_WARP) try_warp(i);
  if (waiting && waiting == alive) release_barrier();
}

void thread_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
  kernel(arguments);
  threads[current].state = DONE;
  alive--;
  if (__tsan_release) __tsan_release(&launch_end);
  on_exit();
  to_main();
  abort();  // nobody resumes a finished thread
}

void start(Thread& thread) {
  thread.state = READY;
  thread.barriers = 0;
  thread.asan_stack = nullptr;
  // As cudacpu_switch leaves a stack: six registers and the address to return to; then the stack is aligned.
  void** top = reinterpret_cast<void**>(thread.stack + STACK - 64);
  *top = reinterpret_cast<void*>(thread_main);
  for (int i = 1; i <= 6; i++) top[-i] = nullptr;
  thread.stack_pointer = top - 6;
  if (__tsan_create_fiber) thread.tsan_fiber = __tsan_create_fiber(0);
}

void prepare_shared() {
  char *begin = __start_cudacpu_shared, *end = __stop_cudacpu_shared;
  forget(begin, end);
  if (begin) fill(begin, end - begin);
  if (!shared_bytes) return;
  if (posix_memalign(&shared, 128, shared_bytes)) abort();
  fill(shared, shared_bytes);
  shared_memory.push_back(shared);
}

void report_deadlock() {
  error("deadlock: %d threads wait at __syncthreads, %d threads are left", waiting, alive);
  for (size_t i = 0, shown = 0; i < threads.size() && shown < 4; i++)
    if (threads[i].state != DONE) error("thread %d waits at %s", (int)i, name(threads[i].site).c_str()), shown++;
}

bool run_block(unsigned block) {
  blockIdx = {block, 0, 0};
  const size_t count = threads.size();
  forget(stacks, stacks + count * STACK);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stacks, count * STACK);
  prepare_shared();
  alive = (int)count;
  for (Thread& thread : threads) start(thread);
  while (alive) {
    bool moved = false;
    for (int i : shuffled((int)count))
      if (threads[i].state == READY) moved = true, resume(i);
    if (!moved) return report_deadlock(), false;
  }
  if (__tsan_destroy_fiber)
    for (Thread& thread : threads) __tsan_destroy_fiber(thread.tsan_fiber);
  return true;
}
}  // namespace

int lane() { return current & 31; }

void* dynamic_shared() { return shared; }

__attribute__((noinline)) uint64_t meet(unsigned mask, uint64_t value, int source, const void* site, bool orders) {
  Thread& self = threads[current];
  self.orders = orders;
  if (!(mask >> lane() & 1)) error("thread %d is not in its own mask %#x at %s", current, mask, name(site).c_str());
  self.state = AT_WARP;
  self.mask = mask;
  self.given = value;
  self.source = source & 31;
  self.site = site;
  try_warp(current);
  to_main();
  return self.received;
}

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  return meet(mask, value, source, __builtin_return_address(0), false);
}
}  // namespace cudacpu

using namespace cudacpu;

void __syncthreads() {
  Thread& self = threads[current];
  self.site = __builtin_return_address(0);
  if (barrier_site && barrier_site != self.site)
    error("threads of a block meet at different __syncthreads, thread %d at %s, another at %s", current,
          name(self.site).c_str(), name(barrier_site).c_str());
  barrier_site = self.site;
  // In turn, so that a slow thread does not acquire what a fast one releases at the barrier after this.
  char* point = &barrier_points[self.barriers++ % 2];
  if (__tsan_release) __tsan_release(point);
  self.state = AT_BARRIER;
  if (++waiting == alive) release_barrier();
  to_main();
  if (__tsan_acquire) __tsan_acquire(point);
}

void __syncwarp(unsigned mask) {
  Thread& self = threads[current];
  if (__tsan_release) __tsan_release(&self.released);
  meet(mask, 0, lane(), __builtin_return_address(0), true);
  if (__tsan_acquire) __tsan_acquire(self.ordered);
}

// ---- the launch that standard input describes

namespace {
struct Argument {
  char kind;
  void* data;  // of a buffer: the buffer
  size_t size;
};

void read(void* to, size_t size) {
  if (!std::cin.read(static_cast<char*>(to), size)) exit(3);
}

Argument read_argument() {
  Argument argument = {0, nullptr, 0};
  read(&argument.kind, 1);
  if (argument.kind == 'b') {
    std::cin >> argument.size;
    std::cin.get();
    // As large as asked for and no larger, aligned as the device's allocator aligns.
    if (posix_memalign(&argument.data, 256, argument.size)) abort();
    read(argument.data, argument.size);
  } else if (argument.kind != 'n') {
    argument.data = malloc(4);
    read(argument.data, 4);
  }
  return argument;
}

void run(unsigned blocks, unsigned count) {
  threads.assign(count, Thread{});
  stacks = (char*)mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (unsigned i = 0; i < count; i++) threads[i].index = {i, 0, 0}, threads[i].stack = stacks + i * STACK;
  blockDim = {count, 1, 1};
  gridDim = {blocks, 1, 1};
  if (__tsan_get_current_fiber) main_fiber = __tsan_get_current_fiber();
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // flush subnormals to zero, as CuPy's -ftz=true does
  for (int block : shuffled((int)blocks))
    if (!run_block(block)) break;
  _mm_setcsr(control);
  if (__tsan_acquire) __tsan_acquire(&launch_end);
  for (void* memory : shared_memory) free(memory);
}
}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string wanted;
  unsigned blocks, count, total;
  std::getline(std::cin, wanted);
  std::cin >> blocks >> count >> shared_bytes >> random_state >> total;
  std::cin.get();
  const auto found = kernels().find(wanted);
  if (found == kernels().end()) return fprintf(stderr, "cudacpu: no kernel %s\n", wanted.c_str()), 2;
  if (count < 1 || count > 1024 || shared_bytes > 48 << 10)
    return fprintf(stderr, "cudacpu: %u threads and %u bytes of shared memory cannot be launched\n", count, shared_bytes), 2;
  kernel = found->second;
  random_state = random_state * 2654435761u + 88172645463325252ull;

  std::vector<Argument> all;
  for (unsigned i = 0; i < total; i++) all.push_back(read_argument());
  std::vector<void*> pointers;
  for (Argument& argument : all)
    pointers.push_back(argument.kind == 'b' || argument.kind == 'n' ? &argument.data : argument.data);
  arguments = pointers.data();
  run(blocks, count);
  for (const Argument& argument : all)
    if (argument.kind == 'b') std::cout.write(static_cast<const char*>(argument.data), argument.size);
  std::cout.flush();
  return errors ? 1 : 0;
}
