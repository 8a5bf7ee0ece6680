# megatron_qwenvl on NVIDIA's PyTorch image, which brings torch, NCCL, Transformer Engine and apex for the GPUs.
#   docker build -t megatron_qwenvl .
#   enroot import -o megatron_qwenvl.sqsh dockerd://megatron_qwenvl           # for pyxis
#   apptainer build megatron_qwenvl.sif docker-daemon://megatron_qwenvl:latest
# The batch scripts take the code from the repository, which they mount; the image needs building again only when
# requirements/container.txt changes.
# The image, megatron-core and Transformer Engine that go together are in docs/versions.md; not built yet, the check below
# decides. An older pair: --build-arg NGC_TAG=26.01-py3 --build-arg MEGATRON_CORE=0.16.1
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}
ARG MEGATRON_CORE=0.19.2

WORKDIR /opt/megatron_qwenvl
COPY requirements requirements
# The image pins its packages in a constraints file; ours are added beside them.
RUN PIP_CONSTRAINT= python3 -m pip install --no-cache-dir --no-deps \
    -r requirements/container.txt megatron-core==${MEGATRON_CORE} \
    && python3 requirements/check_engine.py

COPY pyproject.toml README.md LICENSE ./
COPY megatron_qwenvl megatron_qwenvl
COPY launch launch
COPY tools tools
COPY slurm slurm
ENV PYTHONPATH=/opt/megatron_qwenvl
RUN python3 -m megatron_qwenvl.train --recipe stage1 --print_config > /dev/null
