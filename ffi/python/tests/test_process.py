"""What whole processes do: garbage, exit, fork, interrupts. Each in an interpreter of its own."""

import subprocess
import sys
import textwrap

import pytest

from checkpoints import GOLDEN, SMOLLM2


def run(code, timeout=120):
    code = f"GOLDEN, SMOLLM2 = {str(GOLDEN)!r}, {str(SMOLLM2)!r}\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, timeout=timeout
    )


def check(code):
    done = run(code)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_exit_with_everything_open():
    check("""
        import rewardrt
        runtime = rewardrt.Runtime("cpu", threads=2)
        model = runtime.load_model(SMOLLM2)
        result = model.sample("Hi", max_tokens=2).result()
        ids = result[0].ids
        update = model.update()
        job = model.sample("Once upon a time", n=8, max_tokens=4000, ignore_eos=True)
    """)


def test_exit_while_daemon_threads_wait():
    check("""
        import rewardrt, threading, time
        runtime = rewardrt.Runtime("cpu", threads=2)
        model = runtime.load_model(SMOLLM2)
        for _ in range(4):
            job = model.sample("Once upon a time", max_tokens=4000, ignore_eos=True)
            threading.Thread(target=job.result, daemon=True).start()
        time.sleep(0.2)
    """)


def test_reference_cycles():
    out = check("""
        import gc, rewardrt, weakref
        class Holder: pass
        gone = []
        for _ in range(20):
            runtime = rewardrt.Runtime("cpu", threads=1)
            model = runtime.load_model(GOLDEN + "/llama-tied")
            holder = Holder()
            holder.all = [holder, runtime, model, model.update(), model.sample([[5]], max_tokens=4)]
            holder.result = model.sample([[5]], max_tokens=4).result()
            runtime.holder = model.holder = holder
            gone.append(weakref.ref(runtime._handle))
            del runtime, model, holder
        gc.collect()
        print(sum(ref() is not None for ref in gone))
    """)
    assert out == "0\n"


def test_threads_end_with_their_runtime():
    out = check("""
        import os, rewardrt
        def threads():
            return len(os.listdir("/proc/self/task"))
        before = threads()
        with rewardrt.Runtime("cpu", threads=2) as runtime:
            runtime.load_model(GOLDEN + "/llama-tied").sample([[5]], max_tokens=2).result()
            assert threads() > before
        print(threads() - before)
    """)
    assert out == "0\n"


def test_a_forked_child_ends_and_is_told():
    out = check("""
        import os, rewardrt
        runtime = rewardrt.Runtime("cpu", threads=2)
        model = runtime.load_model(GOLDEN + "/llama-tied")
        child = os.fork()
        if child == 0:
            try:
                model.sample([[5]])
            except rewardrt.Forked as error:
                print(error.status, flush=True)
            del model, runtime  # no thread is there to be joined
            with rewardrt.Runtime("cpu", threads=1) as own:
                print(len(own.load_model(GOLDEN + "/llama-tied").sample([[5]]).result()), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert out == "RRT_E_FORKED\n1\n"


def test_an_interrupt_ends_a_wait():
    done = run("""
        import _thread, rewardrt, threading, time
        runtime = rewardrt.Runtime("cpu", threads=2)
        job = runtime.load_model(SMOLLM2).sample("Once upon a time", max_tokens=4000, ignore_eos=True)
        threading.Timer(0.5, _thread.interrupt_main).start()
        start = time.monotonic()
        try:
            job.result()
        except KeyboardInterrupt:
            print(time.monotonic() - start < 5)
    """)
    assert done.stdout == "True\n", done


def test_no_library_but_numpy_and_cffi_is_imported():
    out = check("""
        import sys, rewardrt
        import numpy
        roots = {name.split(".")[0] for name in sys.modules}
        print(sorted(roots & {"torch", "trl", "ray", "transformers", "pycparser", "safetensors", "tokenizers"}))
    """)
    assert out == "[]\n"


@pytest.mark.parametrize("name", ["py.typed", "_native/ffi.py"])
def test_the_wheel_has(name):
    import pathlib

    import rewardrt

    assert (pathlib.Path(rewardrt.__file__).parent / name).exists()
