"""Merges that are killed, whose inputs fail under them, or that several processes share."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mergeme_ext
from mergeme_ext.io import CheckpointSource
from python_tests.support.checkpoints import llama_tensors, save

RECIPE = """
merge_method: {method}
base_model: base
models:
  - {{model: a, parameters: {{weight: 1, density: 0.5}}}}
  - {{model: b, parameters: {{weight: 0.5, density: 0.7}}}}
"""
HOME = Path(mergeme_ext.__file__).parents[1]
MERGE = [sys.executable, "-m", "mergeme_ext", "merge"]


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed, torch.bfloat16, layers=3, hidden=64))
    (tmp_path / "r.yaml").write_text(RECIPE.format(method="dare_ties"))
    return tmp_path


def run(arguments, models, *, program=MERGE, check=True, **env):
    command = [*program, *arguments, "--no-model-check", "--chunk-elements", "500"]
    done = subprocess.run(
        command,
        cwd=models,
        env={**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def program(text):
    """A program that changes something and then runs the command."""
    end = "from mergeme_ext.cli import main\nsys.exit(main(['merge', *sys.argv[1:]]))\n"
    return [sys.executable, "-c", "import os, sys\n" + textwrap.dedent(text) + end]


KILLED = """
    import signal
    from mergeme_ext.io import CheckpointSink
    write_at, left = CheckpointSink.write_at, [int(os.environ["WRITES"])]
    def dying(self, *args):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        write_at(self, *args)
    CheckpointSink.write_at = dying
"""


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_bytes(models):
    run(["r.yaml", "whole"], models)
    for writes in (1, 40, 7, 90):
        died = run(
            ["r.yaml", "out", "--resume"],
            models,
            program=program(KILLED),
            check=False,
            WRITES=str(writes),
        )
        assert died.returncode == -signal.SIGKILL and not (models / "out").exists()
    run(["r.yaml", "out", "--resume"], models)
    assert contents(models / "out") == contents(models / "whole")


@pytest.mark.slow
def test_interrupts_say_how_to_go_on(models):
    stopped = program(KILLED.replace("signal.SIGKILL", "signal.SIGINT"))
    done = run(["r.yaml", "out"], models, program=stopped, check=False, WRITES="9")
    assert done.returncode == 130
    assert done.stderr == (
        "mergeme merge: stopped; the same command with --resume goes on from there\n"
    )
    done = run(["r.yaml", "out"], models, check=False)
    assert done.returncode == 2 and "an interrupted merge into it can be continued" in done.stderr
    run(["r.yaml", "out", "--resume"], models)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_input_that_shrinks_is_named(models):
    cut = """
        from mergeme_ext.merging import MergePlan
        run = MergePlan.run
        def cutting(self, *args, **kwargs):
            os.truncate("a/model.safetensors", 8192)
            run(self, *args, **kwargs)
        MergePlan.run = cutting
    """
    done = run(["r.yaml", "out"], models, program=program(cut), check=False)
    assert done.returncode == 2 and not (models / "out").exists()
    assert "mergeme: cannot read " in done.stderr and "a/model.safetensors: disk" in done.stderr


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_ranks_write_the_bytes_of_one_process(models, method):
    (models / "r.yaml").write_text(RECIPE.format(method=method))
    run(["r.yaml", "alone"], models)
    run(["r.yaml", "out"], models, program=[*TORCHRUN, "-m", "mergeme_ext", "merge"])
    assert contents(models / "out") == contents(models / "alone")


@pytest.mark.slow
def test_ranks_carry_out_several_documents(models):
    (models / "r.yaml").write_text(
        "name: first\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1}\n---\n"
        "merge_method: linear\nmodels: [{model: first}, {model: base}]\nparameters: {weight: 1}\n"
    )
    run(["r.yaml", "alone"], models)
    run(["r.yaml", "out"], models, program=[*TORCHRUN, "-m", "mergeme_ext", "merge"])
    assert contents(models / "out") == contents(models / "alone")
    assert not [p for p in models.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_rank_that_dies_is_replaced(models):
    run(["r.yaml", "alone"], models)
    script = models / "dying.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys, time
            from mergeme_ext.cli import main
            from mergeme_ext.io import CheckpointSink

            write_at, writes = CheckpointSink.write_at, []

            def dying(self, *args):
                if os.environ["RANK"] == "1" and len(writes) == 5:
                    open("died", "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
                while os.environ["RANK"] == "0" and not os.path.exists("died"):
                    time.sleep(0.01)  # so that rank 1 gets its share
                writes.append(args)
                write_at(self, *args)

            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                CheckpointSink.write_at = dying
            sys.exit(main(["merge", *sys.argv[1:]]))
        """)
    )
    run(["r.yaml", "out"], models, program=[*TORCHRUN, "--max-restarts", "2", str(script)])
    assert (models / "died").exists()
    assert contents(models / "out") == contents(models / "alone")
    assert len(CheckpointSource(models / "out")) == len(CheckpointSource(models / "base"))
    assert not [p for p in models.iterdir() if p.name.startswith(".out")]
