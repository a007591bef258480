# Three images from one base: `docker build --target cpu -t ratchet:cpu .`, and likewise gpu and slim. Slim is for the
# parts without a model (ingest, maintain, console, migrations): it lacks PyTorch and vLLM.
#
# Packages are in layers of their own, below the code: a change of code ships only the last layer again, and cpu and gpu
# share slim's packages. CUDA's libraries come with PyTorch's wheels, so gpu needs no other base; the driver is the host's.
#
# For a registry of yours, pin the base by the digest that `docker buildx imagetools inspect python:3.11-slim-bookworm`
# prints: --build-arg PYTHON=3.11-slim-bookworm@sha256:...
ARG PYTHON=3.11-slim-bookworm

# Builds Ratchet's wheels with a locked setuptools; the lock also has the tool that writes the SBOM (locks/finish.sh).
FROM python:${PYTHON} AS wheels
COPY locks/build.txt locks/finish.sh /locks/
RUN python -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes --no-deps --requirement /locks/build.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY client client
COPY core core
COPY demo demo
COPY ops ops
COPY streams streams
COPY serving serving
COPY updater updater
RUN /build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels ./client .

# Everything is installed into /usr/local, not into a virtual environment: KubeRay starts Ray from a login shell, which
# resets PATH. Locks name each package by version and digest (`make lock`).
FROM python:${PYTHON} AS run
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RATCHET_HOME=/var/lib/ratchet
RUN groupadd --gid 10001 ratchet \
    && useradd --uid 10001 --gid ratchet --create-home --home-dir /home/ratchet --shell /usr/sbin/nologin ratchet \
    && install --directory --owner ratchet --group ratchet --mode 0750 /var/lib/ratchet /run/ratchet
RUN --mount=type=bind,source=locks/slim.txt,target=/locks/slim.txt --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement /locks/slim.txt
WORKDIR /var/lib/ratchet
ENTRYPOINT ["ratchet"]

FROM run AS slim
EXPOSE 8001 9464 9466
RUN --mount=type=bind,from=wheels,target=/mnt sh /mnt/locks/finish.sh
USER 10001:10001
CMD ["console"]
# Each part has its own check where it is started: compose.yaml, the chart.
HEALTHCHECK NONE

FROM run AS models
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
EXPOSE 8000 8001 9464 9465 9466
CMD ["serve"]
# For `ratchet serve`; the other parts have their own checks.
HEALTHCHECK --interval=30s --timeout=15s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=12)"]

# No compiler: on a processor nothing is compiled when vLLM starts (serving/engines/vlm/vllm_start.py).
# PyTorch's builds for processors are only in PyTorch's own index.
FROM models AS cpu
RUN --mount=type=bind,source=locks/cpu.txt,target=/locks/cpu.txt --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu --require-hashes --no-deps --requirement /locks/cpu.txt
RUN --mount=type=bind,from=wheels,target=/mnt sh /mnt/locks/finish.sh
USER 10001:10001

# Triton compiles its kernels' launchers when vLLM starts, so this image has a C compiler. Which GPUs a container sees is
# said where it is started.
FROM models AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,source=locks/gpu.txt,target=/locks/gpu.txt --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement /locks/gpu.txt
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=wheels,target=/mnt sh /mnt/locks/finish.sh
USER 10001:10001
