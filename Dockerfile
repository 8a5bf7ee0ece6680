# megatron_qwenvl on NVIDIA's PyTorch image, which brings torch, NCCL, Transformer Engine and apex for the GPUs.
#   docker build -t megatron_qwenvl .
#   enroot import -o megatron_qwenvl.sqsh dockerd://megatron_qwenvl           # for pyxis
#   apptainer build megatron_qwenvl.sif docker-daemon://megatron_qwenvl:latest
# The batch scripts take the code from the repository, which they mount; the image needs building again only when
# requirements/container.txt changes.
# By what can be read, 26.01 holds torch 2.10.0a0, CUDA 13.1 and Transformer Engine 2.11, the newest that megatron-core
# 0.16.1 asks for; images from 26.02 on most probably hold a newer one. Not built yet: the check below decides.
ARG NGC_TAG=26.01-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /opt/megatron_qwenvl
COPY requirements/container.txt requirements/
# The image pins its packages in a constraints file; ours are added beside them.
RUN PIP_CONSTRAINT= python3 -m pip install --no-cache-dir --no-deps -r requirements/container.txt

# megatron-core 0.16.1 asks for Transformer Engine 2.9 to 2.11: another NGC_TAG must bring one of these.
RUN python3 -c "from importlib.metadata import version as v; \
te = tuple(map(int, v('transformer-engine').split('.')[:2])); \
assert (2, 9) <= te < (2, 12), f'expected Transformer Engine 2.9 to 2.11, found {te}: choose another NGC_TAG'"

COPY pyproject.toml README.md LICENSE ./
COPY megatron_qwenvl megatron_qwenvl
COPY launch launch
COPY tools tools
COPY slurm slurm
ENV PYTHONPATH=/opt/megatron_qwenvl
RUN python3 -m megatron_qwenvl.train --recipe stage1 --print-config > /dev/null
