# For NVIDIA GPUs. CUDA 13 is installed from wheels; the host provides the driver (580 or later). Build from the repository's root:
#   docker build -f infra/docker/cuda.Dockerfile -t sophia-levanter-cuda:0.2.0 .

FROM python:3.12.12-slim-bookworm AS build
WORKDIR /build
COPY constraints.txt ./
COPY infra/constraints.txt infra/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY src src/
RUN /opt/venv/bin/pip install --no-cache-dir --no-build-isolation -c constraints.txt -c infra/constraints.txt \
    '.[data,cluster]' 'ray[default]' 'jax[cuda13]'

FROM python:3.12.12-slim-bookworm
# KubeRay's probes call wget, and Ray's dashboard calls ps.
RUN apt-get update \
    && apt-get install -y --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home trainer
COPY --from=build /opt/venv /opt/venv
COPY config /app/config/
COPY infra/ray /app/infra/ray/
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Google Kubernetes Engine mounts the host's driver here. NVIDIA's container runtime, used elsewhere, needs no setting.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
WORKDIR /home/trainer
# Use a numeric ID, because Kubernetes cannot verify that a user name is not root's.
USER 10001:10001
CMD ["python", "-m", "sophia_levanter.main", "--help"]
