# CPU:   docker build -t jaxcrit .
# CUDA:  docker build -t jaxcrit:cuda --build-arg EXTRA=cuda .      (the driver comes from the host: --gpus=all)
# Run:   docker run --rm -v "$PWD":/work jaxcrit analyze --out=/work/run
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY jaxcrit ./jaxcrit
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
ARG EXTRA=""
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRA:+[$EXTRA]}" && rm -r /wheels \
    && useradd --create-home --uid 1000 jaxcrit
USER 1000
ENV JAXCRIT_CACHE=/home/jaxcrit/.cache/jaxcrit
WORKDIR /work
ENTRYPOINT ["jaxcrit"]
CMD ["--help"]
