# One image for every node of a Ray cluster (head, workers, job submitter) and for a single GPU machine.
#
#   docker build -t anneal .     --build-arg UNSLOTH=1 adds Unsloth (AGPL-3.0 parts), TRACKERS=1 W&B, MLflow and TensorBoard
#   docker run --gpus all --init --shm-size=8g anneal cookbooks/x.yaml num_devices=1
#   docker run --gpus all --init --shm-size=8g anneal ray start --head --block
#
# torch brings its CUDA libraries, so the base needs none.
ARG CUDA=13.0.2-base-ubuntu24.04

FROM nvidia/cuda:${CUDA} AS build
# Security updates of the base's own Python are wanted: versions stay open.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml ./
COPY requirements requirements
ARG UNSLOTH=0
ARG TRACKERS=0
ARG SERVICE=0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Like `make setup`: the locks pin every file by its hash, and pyproject.toml pins torch's version.
RUN python3 -m venv /opt/venv \
    && export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 \
    && /opt/venv/bin/pip install --require-hashes -r requirements/bootstrap.lock \
    && /opt/venv/bin/pip install "$(sed -nE 's/^    "(torch==[^"]+)",$/\1/p' pyproject.toml)" \
    && locks=(-r requirements/runtime.lock -r requirements/cluster.lock) \
    && if [[ "$UNSLOTH" == 1 ]]; then locks+=(-r requirements/unsloth.lock); fi \
    && if [[ "$TRACKERS" == 1 ]]; then locks+=(-r requirements/trackers.lock); fi \
    && if [[ "$SERVICE" == 1 ]]; then locks+=(-r requirements/service.lock); fi \
    && /opt/venv/bin/uv pip install --no-deps --require-hashes --build-constraints requirements/bootstrap.lock \
        --compile-bytecode --python /opt/venv/bin/python "${locks[@]}"

FROM nvidia/cuda:${CUDA}
LABEL org.opencontainers.image.title="Anneal" \
      org.opencontainers.image.description="Fine-tune an LLM as a Ray TorchTrainer job that a YAML describes" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles its launchers on the machine it runs on: a C compiler and Python's headers belong to the GPU
# kernels. DeepSpeed compiles the optimizer of ZeRO with offloading, in C++. Older KubeRay operators probe with wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 gcc g++ libc6-dev libpython3-dev ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1001 --create-home --shell /bin/bash anneal
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/anneal
COPY LICENSE main.py ./
COPY configs configs
COPY utils utils
COPY runs runs
COPY training training
COPY service service
COPY cookbooks cookbooks
# The user can write only to the home directory, so the embedded bucket is stored there.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/home/anneal \
    ANNEAL_EMBEDDED_BUCKET=/home/anneal/bucket
USER 1001:1001
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["python", "-c", "import ray, torch"]
# A YAML, an option or a command of main.py is passed to main.py; any other command (ray start, bash) runs unchanged.
ENTRYPOINT ["/bin/bash", "-c", "case \"$1\" in *.yaml|*.yml|-*|convert|runs|show|compare|stop|remove|export|chat|evaluate|serve|keys) exec python main.py \"$@\";; *) exec \"$@\";; esac", "anneal"]
CMD ["--help"]
