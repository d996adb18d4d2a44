"""New weights: from numpy, from torch through DLPack, from files; all or nothing."""

import ctypes

import numpy as np
import pytest

import rewardrt
import rewardrt.trl

from checkpoints import GOLDEN, expected, read_safetensors, write_safetensors

# Its weights are float32, and its head is the embedding.
F32 = "qwen2-tied-window"


@pytest.fixture
def weights():
    return read_safetensors(GOLDEN / F32)


def logprobs(model):
    return model.logprobs(expected(F32)["sequences"]).result(60).values.copy()


def doubled(weights):
    return {name: value * 2 if name.endswith("mlp.down_proj.weight") else value for name, value in weights.items()}


def test_tensors_are_what_an_update_brings(golden, weights):
    found = {t.name: (t.dtype, t.shape) for t in golden(F32).tensors()}
    assert found == {name: ("float32", value.shape) for name, value in weights.items()}


def test_numpy(golden, weights):
    model = golden(F32)
    before = logprobs(model)
    with model.update(version=7) as update:
        update.put_all(doubled(weights))
    assert model.version == 7
    changed = logprobs(model)
    assert not np.array_equal(before, changed, equal_nan=True)
    with model.update() as update:
        update.put_all(weights.items())
    assert model.version == 8
    np.testing.assert_array_equal(logprobs(model), before)
    result = model.sample([[5]], max_tokens=2, ignore_eos=True).result(60)
    assert result[0].version == 8
    assert result[0].spans == ((2, 8),)


def test_an_update_equals_loading(golden, weights, runtime, tmp_path):
    """Through files, and as whole checkpoints from numpy: the same bits."""
    other = {name: (value + np.float32(0.01)) for name, value in weights.items()}
    write_safetensors(tmp_path / "model.safetensors", other)
    (tmp_path / "config.json").write_bytes((GOLDEN / F32 / "config.json").read_bytes())
    want = logprobs(runtime.load_model(tmp_path, precision="f32"))
    put, files = golden(F32), golden(F32)
    with put.update() as update:
        update.put_all(other)
    with files.update() as update:
        update.put_files(tmp_path)
    np.testing.assert_array_equal(logprobs(put), want)
    np.testing.assert_array_equal(logprobs(files), want)


def test_slices_and_strides(golden, weights):
    """Parts, and arrays that are not row-major."""
    model, name = golden(F32), "model.layers.0.mlp.down_proj.weight"
    value = doubled(weights)[name]
    with model.update(require="subset") as update:
        update.put(name, np.asfortranarray(value))
    want = logprobs(model)
    model = golden(F32)
    half = value.shape[0] // 2
    with model.update(require="subset") as update:
        update.put_slice(name, value[:half], [0, 0])
        update.put_slice(name, value[half:, ::-1][:, ::-1], [half, 0])
    np.testing.assert_array_equal(logprobs(model), want)


class Exported:
    """A tensor that speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack(golden, weights):
    model = golden(F32)
    with model.update() as update:
        update.put_all({name: Exported(np.array(value)) for name, value in doubled(weights).items()})
    want = golden(F32)
    with want.update() as update:
        update.put_all(doubled(weights))
    np.testing.assert_array_equal(logprobs(model), logprobs(want))


def test_dlpack_with_strides(golden, weights):
    name = "model.layers.0.mlp.down_proj.weight"
    models = golden(F32), golden(F32)
    for model, value in zip(models, (weights[name] * 2, Exported(np.asfortranarray(weights[name] * 2))), strict=True):
        with model.update(require="subset") as update:
            update.put(name, value)
    np.testing.assert_array_equal(logprobs(models[0]), logprobs(models[1]))


def test_torch(golden, weights):
    torch = pytest.importorskip("torch", reason="tested by make test-training")
    model = golden(F32)
    before = logprobs(model)
    with model.update(convert=True) as update:
        for name, value in weights.items():
            tensor = torch.nn.Parameter(torch.tensor(value).to(torch.bfloat16))
            assert tensor.requires_grad
            update.put(name, tensor)
    rounded = logprobs(model)
    with model.update() as update:
        update.put_all({n: torch.tensor(v).to(torch.bfloat16).to(torch.float32).numpy() for n, v in weights.items()})
    np.testing.assert_array_equal(logprobs(model), rounded)
    assert not np.array_equal(before, rounded, equal_nan=True)


class _DLManagedTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, on the host and row-major without gaps."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Bfloat16:
    """The upper halves of float32, as bfloat16 through DLPack: kDLBfloat is 4, kDLCPU 1."""

    def __init__(self, array):
        self.bits = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
        self.float32 = (self.bits.astype(np.uint32) << 16).view(np.float32)

    def __dlpack__(self, **_):
        self._shape = (ctypes.c_int64 * self.bits.ndim)(*self.bits.shape)
        self._managed = _DLManagedTensor(self.bits.ctypes.data, 1, 0, self.bits.ndim, 4, 16, 1, self._shape)
        return _capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self):
        return 1, 0


def test_bfloat16(golden, weights):
    halves = {name: Bfloat16(value * np.float32(1.1)) for name, value in weights.items()}
    model, want = golden(F32), golden(F32)
    with model.update(convert=True) as update:
        update.put_all(halves)
    with want.update() as update:
        update.put_all({name: value.float32 for name, value in halves.items()})
    np.testing.assert_array_equal(logprobs(model), logprobs(want))
    with pytest.raises(rewardrt.ShapeError, match="float32|F32"):
        model.update(require="subset").put("model.norm.weight", halves["model.norm.weight"])


def test_bfloat16_into_a_bfloat16_model(real):
    name = "model.norm.weight"
    shape = next(t.shape for t in real.tensors() if (t.name, t.dtype) == (name, "bfloat16"))
    ones = np.ones(shape, np.float32)
    update = real.update(require="subset")
    update.put(name, Bfloat16(ones))
    with pytest.raises(rewardrt.Duplicate):
        update.put(name, Bfloat16(ones))
    with pytest.raises(rewardrt.ShapeError, match="float32|F32"):
        real.update(require="subset").put(name, ones)
    update.abort()


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_byte_orders(golden, weights, order):
    model, want = golden(F32), golden(F32)
    with model.update() as update:
        update.put_all({name: value.astype(order) for name, value in doubled(weights).items()})
    with want.update() as update:
        update.put_all(doubled(weights))
    np.testing.assert_array_equal(logprobs(model), logprobs(want))


class OnDevice:
    """A parameter in the memory of an accelerator, as far as it is looked at."""

    class device:
        type = "cuda"

    def __init__(self, array):
        self._array = array

    def detach(self):
        return self

    def data_ptr(self):
        return self._array.ctypes.data

    def cpu(self):
        return self._array

    def __dlpack_device__(self):
        return 2, 0  # kDLCUDA

    def __dlpack__(self, **_):
        raise BufferError("the host cannot read it")


def test_a_trainers_parameters_come_from_its_device(golden, weights):
    class Module:
        def named_parameters(self, remove_duplicate):
            assert not remove_duplicate
            return ((name, OnDevice(value)) for name, value in doubled(weights).items())

    model, want = golden(F32), golden(F32)
    assert rewardrt.trl.push(model, Module()) == 1
    with want.update() as update:
        update.put_all(doubled(weights))
    np.testing.assert_array_equal(logprobs(model), logprobs(want))
    with pytest.raises(rewardrt.ArgumentError, match="DLPack type 2"):
        model.update().put("model.norm.weight", OnDevice(weights["model.norm.weight"]))


def test_an_exception_aborts(golden, weights):
    model = golden(F32)
    before = logprobs(model)
    with pytest.raises(KeyError), model.update(version=9) as update:
        update.put_all(doubled(weights))
        raise KeyError("the trainer failed")
    assert model.version == 0
    np.testing.assert_array_equal(logprobs(model), before)


def test_refusals_leave_the_update_usable(golden, weights):
    model = golden(F32)
    with model.update(version=3) as update:
        name = "model.norm.weight"
        with pytest.raises(rewardrt.NotFound, match="no.such.tensor"):
            update.put("no.such.tensor", weights[name])
        with pytest.raises(rewardrt.ShapeError, match="model.norm.weight"):
            update.put(name, weights[name][:-1])
        with pytest.raises(rewardrt.ShapeError, match="float64"):
            update.put(name, weights[name].astype(np.float64))
        with pytest.raises(rewardrt.ShapeError, match="model.embed_tokens.weight"):
            update.commit()  # nothing was put
        update.put_all(weights)
        with pytest.raises(rewardrt.Duplicate, match="model.norm.weight"):
            update.put(name, weights[name])
    assert model.version == 3


def test_versions_that_do_not_fit(golden):
    model = golden(F32, version=4)
    with pytest.raises(rewardrt.Conflict):
        model.update(expect_version=3)
    shape = next(t.shape for t in model.tensors() if t.name == "model.norm.weight")
    with pytest.raises(rewardrt.NonFinite), model.update(require="subset", check_finite=True) as update:
        update.put("model.norm.weight", np.full(shape, np.nan, np.float32))
    assert model.version == 4


def test_sequences_under_way_keep_going(real):
    """Pausing keeps, and sleeping gives memory back, without a change to what is sampled."""
    want = real.sample("Once upon a time", max_tokens=24, seed=5, ignore_eos=True).result(60)[0]
    job = real.sample("Once upon a time", max_tokens=24, seed=5, ignore_eos=True)
    real.sleep(in_flight="keep")
    assert not job.done()
    real.wake()
    np.testing.assert_array_equal(job.result(60)[0].ids, want.ids)
    np.testing.assert_array_equal(job.result()[0].logprobs, want.logprobs)


def test_pause(runtime, golden):
    model = golden(F32)
    runtime.pause()
    try:
        job = model.sample([[5]], max_tokens=1)
        with pytest.raises(rewardrt.Timeout):
            job.result(0.05)
    finally:
        runtime.resume()
    assert len(job.result(60)[0].ids) == 1
