"""python benchmarks/bench_checksums.py [--samples 256] [--side 448]

Measure the cost of the checksums of text and images in the loader: CPU time of reading, decoding and rendering samples
of one 640x480 JPEG each, and the share of the checksums in it. The page cache is warm; on a cold disk the share is
smaller.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path
from random import Random

from PIL import Image

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.loading import reader
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.data.shards.samples import checksum


def write_shard(path: Path, samples: int) -> None:
    """Write captions of noisy gradients, which compress about as photographs do."""
    rng = Random(0)
    noise = Image.frombytes("RGB", (80, 60), rng.randbytes(80 * 60 * 3)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=90)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            record = json.dumps(
                {"task": "caption", "caption": f"image {number} " + "of some words " * 4}
            ).encode()
            for suffix, data in (("jpg", buffer.getvalue()), ("json", record)):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    print(f"JPEG of {len(buffer.getvalue())} bytes, {samples} samples")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--side", type=int, default=448, help="image size of the model")
    arguments = parser.parse_args()
    spent = 0.0

    def timed(pieces: list[bytes]) -> int:
        nonlocal spent
        start = time.thread_time()
        found = checksum(pieces)
        spent += time.thread_time() - start
        return found

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "s")
        source.mkdir()
        write_shard(source / "000000.tar", arguments.samples)
        index_directory(source, IndexJob())
        sources = "[{name: s, path: s, weight: 1}]"
        overrides = [
            "--data.root",
            folder,
            "--data.sources",
            sources,
            "--data.global_batch_size",
            str(arguments.samples),
        ]
        config = load_config("tiny_stage1", [*overrides, "--data.image_size", str(arguments.side)])
        tokenizer = load_tokenizer()
        sampler = open_training_sampler(config, tokenizer.fingerprint)
        samples = sampler.global_batch(0).samples
        reads = reader.SampleReader(sampler, tokenizer, config.model.image_tokens)
        reader.checksum = timed  # type: ignore[assignment]
        for _ in range(3):
            spent, start = 0.0, time.thread_time()
            for row in range(len(samples)):
                reads.tokens(samples, row)
                reads.pixels(samples, row)
            total = time.thread_time() - start
            each = 1e6 / len(samples)
            print(
                f"{total * each:.0f} us of CPU a sample, checksums {spent * each:.1f} us: {spent / total:.2%}"
            )


if __name__ == "__main__":
    main()
