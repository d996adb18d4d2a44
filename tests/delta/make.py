"""Makes the fixtures of tests/delta.rs with the libraries that slime writes its deltas with, and checks ours as slime's engine does.

    python3 -m venv v && v/bin/pip install numpy==2.4.6 safetensors==0.8.0 zstandard==0.25.0 xxhash==4.1.0
    v/bin/python tests/delta/make.py                       # writes the folders beside this file
    v/bin/python tests/delta/make.py check OLD DELTA NEW   # DELTA, applied to the file OLD, gives the file NEW

The format, from slime's update_weight_from_disk_delta.py: a folder weight_vNNNNNN of safetensors whose tensors are zstd
frames, their metadata the checksums of the new bytes, and an index that says how to apply them.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import xxhash
import zstandard

HERE = Path(__file__).parent
SHAPES = {"bf16": ("BF16", (64, 33)), "f16": ("F16", (3, 5, 1)), "f32": ("F32", (17, 5)), "scalar": ("F32", ()),
          "odd": ("U8", (7,)), "empty": ("F32", (0, 4)), "same": ("BF16", (8, 8))}
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}

CHECKSUMS = {
    "xxh3-128": lambda b: xxhash.xxh3_128(b.tobytes()).hexdigest(),
    "adler32": lambda b: f"{zlib.adler32(b.tobytes()):08x}",
}


def write_checkpoint(path, tensors):
    """Plain bytes with a header: numpy has no bf16."""
    header, end = {}, 0
    for name, data in tensors.items():
        dtype, shape = SHAPES[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + data.size]}
        end += data.size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(d.tobytes() for d in tensors.values()))


def read_checkpoint(path):
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    spans = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    return {k: np.frombuffer(raw[8 + n + a : 8 + n + b], np.uint8) for k, (a, b) in spans.items()}


def encode(encoding, old, new):
    if encoding == "xor":
        return old ^ new
    places = np.nonzero(old != new)[0]
    return np.concatenate([np.array([places.size, *places], "<u4").view(np.uint8), new[places]])


def write_delta(version, encoding, checksum, old, new, files):
    """`files` as several ranks would write them."""
    folder = HERE / f"weight_v{version:06d}"
    folder.mkdir(exist_ok=True)
    changed = [name for name in old if not np.array_equal(old[name], new[name])]
    weight_map = {}
    for i in range(files):
        frames, sums = {}, {}
        for name in changed[i::files]:
            frame = zstandard.ZstdCompressor(level=1).compress(encode(encoding, old[name], new[name]).tobytes())
            frames[name] = np.frombuffer(frame, np.uint8)
            sums[name] = CHECKSUMS[checksum](new[name])
            weight_map[name] = f"model-{i:05d}-of-{files:05d}.safetensors"
        (folder / f"model-{i:05d}-of-{files:05d}.safetensors").write_bytes(safetensors.numpy.save(frames, metadata=sums))
    metadata = {"version": f"{version:06d}", "base_version": f"{version - 1:06d}", "delta_encoding": encoding,
                "compression_format": "zstd", "checksum_format": checksum}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def check(old, folder, new):
    """What slime's engine does to pull a delta."""
    state = {name: data.copy() for name, data in read_checkpoint(old).items()}
    metadata = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["compression_format"] == "zstd" and int(metadata["base_version"]) < int(metadata["version"])
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "numpy") as file:
            sums = file.metadata()
            for name in file.keys():
                delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(file.get_tensor(name).tobytes()), np.uint8)
                if metadata["delta_encoding"] == "xor":
                    state[name] ^= delta
                else:
                    n = int(delta[:4].view("<u4")[0])
                    state[name][delta[4 : 4 + 4 * n].view("<u4")] = delta[4 + 4 * n :]
                assert CHECKSUMS[metadata["checksum_format"]](state[name]) == sums[name], name
    want = read_checkpoint(new)
    assert state.keys() == want.keys() and all(np.array_equal(state[k], want[k]) for k in want)
    print(f"{folder}: right")


def main():
    random = np.random.default_rng(5)
    sizes = {name: SIZES[dtype] * int(np.prod(shape)) for name, (dtype, shape) in SHAPES.items()}
    state = {name: random.integers(0, 256, size, np.uint8) for name, size in sizes.items()}
    write_checkpoint(HERE / "state_0.safetensors", state)
    for version, encoding, checksum, files in [(1, "xor", "xxh3-128", 2), (2, "overwrite", "adler32", 1),
                                               (3, "xor", "xxh3-128", 0)]:
        new = {name: data.copy() for name, data in state.items()}
        for name, data in new.items():
            if data.size and name != "same" and files:
                data[random.integers(0, data.size, max(1, data.size // 50))] ^= np.uint8(1 + version)
        write_delta(version, encoding, checksum, state, new, files)
        state = new
        write_checkpoint(HERE / f"state_{version}.safetensors", state)


if __name__ == "__main__":
    check(*map(Path, sys.argv[2:])) if sys.argv[1:2] == ["check"] else main()
