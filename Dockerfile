# lqexport with llama.cpp's engine and the plots, for CPUs. Nothing builds this image in CI.
#
#     docker build -t lqexport .
#     docker run --rm -v "$PWD:/models" lqexport export ./model model-Q4_K_M.gguf
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY . /usr/src/lqexport
WORKDIR /usr/src/lqexport
# The second index has PyTorch's build for CPUs, which is several GB smaller.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[llamacpp,report]'

WORKDIR /models
ENTRYPOINT ["lqexport"]
