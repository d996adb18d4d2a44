"""Where the checkpoints of the tests are, and what is expected of them."""

import json
import pathlib
import struct

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
SMOLLM2 = ROOT / ".cache" / "smollm2"


def expected(name):
    """What transformers computed for a golden checkpoint."""
    return json.loads((GOLDEN / name / "expected.json").read_text())


def read_safetensors(folder, file="model.safetensors"):
    """Tensors of a checkpoint folder of F32 or BF16 as float32 arrays, read by the format's own description."""
    data = (folder / file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        bits = data[8 + size + start : 8 + size + end]
        if entry["dtype"] == "BF16":
            value = (np.frombuffer(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            assert entry["dtype"] == "F32"
            value = np.frombuffer(bits, np.float32)
        tensors[name] = value.reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    """The same the other way round."""
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
