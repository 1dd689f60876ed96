# An image for the nodes of a Ray cluster, for example of docs/guides/rayjob.yaml.
#
#     docker build --tag raykeras:0.1.0 .
#     docker build --tag raykeras:0.1.0-gpu \
#         --build-arg IMAGE=rayproject/ray:2.60.0-py311-gpu --build-arg EXTRAS=gpu,s3 .
#     docker run --rm --shm-size=4g raykeras:0.1.0 raykeras fit pipelines/digits.py

# Ray of constraints.txt, because a cluster needs one version of Ray and Python on all nodes.
ARG IMAGE=rayproject/ray:2.60.0-py311
# hadolint ignore=DL3006
FROM ${IMAGE}

ARG EXTRAS=s3
WORKDIR /home/ray/app
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users raykeras raykeras
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" && raykeras --version
COPY --chown=ray:users pipelines pipelines
