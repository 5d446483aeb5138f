# One image for the control plane, the agents and the parallax command. It holds no key and no certificate.
FROM python:3.13.7-slim-bookworm AS build
WORKDIR /src
COPY requirements.lock requirements-runtime.lock ./
RUN python -m venv --without-pip /opt/parallax
RUN pip --python /opt/parallax install --require-hashes -r requirements-runtime.lock
# What builds the wheel has its version and hashes from the other lock, and stays in this stage.
RUN sed -n '/^setuptools==/,/[^\]$/p' requirements.lock >build.lock
RUN pip install --require-hashes -r build.lock
COPY LICENSE README.md pyproject.toml ./
COPY control_plane control_plane
COPY protos protos
COPY runtime runtime
COPY sdk sdk
COPY security security
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist .
RUN pip --python /opt/parallax install --no-deps dist/*.whl

FROM python:3.13.7-slim-bookworm
COPY --from=build /opt/parallax /opt/parallax
ENV PATH=/opt/parallax/bin:$PATH
# A new volume takes its owner and mode from the directory that it is first mounted on.
RUN install -d -m 700 -o 10001 -g 10001 /certs /data
WORKDIR /app
COPY --chmod=444 examples/sentiment.py ./
USER 10001:10001
CMD ["parallax", "--help"]
