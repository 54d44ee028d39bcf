# For TPU hosts. libtpu is installed from a wheel. Build from the repository's root:
#   docker build -f infra/docker/tpu.Dockerfile -t sophia-levanter-tpu:0.2.0 .

FROM python:3.12.12-slim-bookworm AS build
WORKDIR /build
COPY constraints.txt ./
COPY infra/constraints.txt infra/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY src src/
RUN /opt/venv/bin/pip install --no-cache-dir --no-build-isolation -c constraints.txt -c infra/constraints.txt \
    '.[data,cluster,tpu]' 'ray[default]'

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
WORKDIR /home/trainer
# Use a numeric ID, because Kubernetes cannot verify that a user name is not root's.
USER 10001:10001
CMD ["python", "-m", "sophia_levanter.main", "--help"]
