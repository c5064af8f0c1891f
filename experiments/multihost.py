"""Several processes, one training run: the zoo's GPT on real text, sharded over them, saved, killed and resumed.

In: flags. Out: the losses of one process, of several, and of several of which one is killed and all are started again
from the last save; a table of their differences and of the steps that were lost, and a CSV file; exit code 1 where a
loss differs or more is lost than asked. The processes are real and talk over the loopback interface
(`jax.distributed`, Gloo); each has the CPU devices that it is given. The step is sharded by `memopt.passes.Shard`.

    python experiments/multihost.py --processes=2,4 --steps=12
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import _report
import _text
from absl import app, flags

#: Losses of sharded runs may differ by this much: sums are taken in another order.
TOLERANCE = 1e-4
COLUMNS = (
    _report.Column("run", "run"),
    _report.Column("processes", "processes", "number"),
    _report.Column("devices", "devices", "number"),
    _report.Column("steps", "steps", "number"),
    _report.Column("first_loss", "first loss", "number"),
    _report.Column("last_loss", "last loss", "number"),
    _report.Column("difference", "largest difference", "number"),
    _report.Column("lost_steps", "steps run twice", "number"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("processes", ["2", "4"], "Numbers of processes to run with, beside one.")
    flags.DEFINE_integer("devices", 1, "CPU devices of each process.", lower_bound=1)
    flags.DEFINE_integer("steps", 12, "Steps of training.", lower_bound=1)
    flags.DEFINE_integer("save_every", 4, "Steps between two saves.", lower_bound=1)
    flags.DEFINE_integer("kill_after", 6, "The step after which a worker of the last run is killed; 0 for none.")
    flags.DEFINE_integer("resume_with", 0, "Processes that the killed run goes on with; 0 for as many as before.")
    flags.DEFINE_string("strategy", "zero3", "Strategy of memopt.passes.Shard.")
    flags.DEFINE_integer("batch", 8, "Windows of text in a batch.")
    flags.DEFINE_float("patience", 300.0, "Seconds until a run that makes no progress is an error.")
    flags.DEFINE_string("out_dir", "out/multihost", "Folder for saves, losses and the CSV file.")
    flags.DEFINE_integer("worker", -1, "Used by the script itself: the number of this process.")
    flags.DEFINE_integer("workers", 1, "Used by the script itself: how many there are.")
    flags.DEFINE_string("coordinator", "", "Used by the script itself: where the first process listens.")


def work(values: Any) -> None:
    """Be one worker: train from the last save, or from the start, and let process 0 write the losses."""
    import jax
    import orbax.checkpoint as ocp

    import memopt
    from memopt.models import steps

    if values.workers > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(values.coordinator, values.workers, values.worker)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    step, shapes, options = steps.reference_step("gpt2", tiny=True, batch=values.batch)
    passes = [*memopt.passes.default(), memopt.passes.Shard(mesh, values.strategy, least_elements=1)]
    train = memopt.optimize(step, passes=passes, **options)
    (state_places, batch_places), _ = train.shardings(*shapes)
    folder = pathlib.Path(values.out_dir).absolute()
    settings = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager(folder / "saves", options=settings) as manager:
        state = _restored(manager, shapes[0], state_places)
        text, length = _text.load("train", max_bytes=1 << 20), shapes[1]["tokens"].shape[1]
        for number in range(int(state.step), values.steps):
            window = _text.batch(text, step=number, size=values.batch, length=length, seed=0)
            batch = {"tokens": window[:, :-1], "labels": window[:, 1:]}
            state, loss = train(state, jax.tree.map(_placed, batch, batch_places))
            if jax.process_index() == 0:
                with (folder / "losses.jsonl").open("a") as file:
                    file.write(json.dumps({"step": number, "loss": float(loss)}) + "\n")
            if (number + 1) % values.save_every == 0:
                manager.save(number + 1, args=ocp.args.StandardSave(_arrays(state)))


def _arrays(state: Any) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _placed(array: Any, place: Any) -> Any:
    """Give each process its own part of an array that all of them have."""
    import jax

    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _restored(manager: Any, shape: Any, places: Any) -> Any:
    """Return the state of the last good save, on this run's mesh whatever it was saved on, or a new one."""
    import jax
    import orbax.checkpoint as ocp

    from memopt.models import steps

    latest = manager.latest_step()
    if latest is None:
        return jax.tree.map(_placed, jax.tree.map(jax.device_get, steps.concrete(shape, seed=0)), places)
    wanted = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shape, places)
    return shape.replace(**manager.restore(latest, args=ocp.args.StandardRestore(_arrays(wanted))))


class Run:
    """The processes of one training run, started anew from the last save where one was killed."""

    def __init__(self, values: Any, name: str, count: int):
        self.values, self.count = values, count
        self.folder = pathlib.Path(values.out_dir) / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def start(self) -> list[subprocess.Popen]:
        """Start all processes."""
        values, port = self.values, _free_port()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={values.devices}",
        }
        common = [f"--{key}={getattr(values, key)}" for key in ("devices", "steps", "save_every", "strategy", "batch")]
        common += [f"--out_dir={self.folder}", f"--workers={self.count}", f"--coordinator=127.0.0.1:{port}"]
        return [
            subprocess.Popen(
                [sys.executable, __file__, *common, f"--worker={i}"],
                env=environment,
                stdout=(self.folder / f"worker{i}.log").open("a"),
                stderr=subprocess.STDOUT,
            )
            for i in range(self.count)
        ]

    def finish(self, kill_after: int = 0) -> None:
        """Run to the end; with `kill_after` first kill the last worker after that step.

        Raises:
          RuntimeError: a worker failed, or none made progress for too long.
        """
        workers = self.start()
        try:
            while any(worker.poll() is None for worker in workers):
                failed = [i for i, worker in enumerate(workers) if worker.poll() not in (None, 0)]
                if failed:
                    raise RuntimeError(f"worker {failed[0]} failed, see {self.folder / f'worker{failed[0]}.log'}")
                if kill_after and len(self.rows()) > kill_after:
                    workers[-1].send_signal(signal.SIGKILL)
                    return
                if time.time() - self._last_change() > self.values.patience:
                    raise RuntimeError(f"no step for {self.values.patience:.0f} s, see {self.folder}")
                time.sleep(0.05)
            if any(worker.returncode for worker in workers):
                raise RuntimeError(f"a worker failed, see {self.folder}")
        finally:
            for worker in workers:  # without one of them the others wait for ever
                worker.kill()
                worker.wait()

    def _last_change(self) -> float:
        return max(path.stat().st_mtime for path in [self.folder, *self.folder.iterdir()])

    def rows(self) -> list[dict[str, Any]]:
        """Return every step that was taken, in order, those taken twice twice."""
        path = self.folder / "losses.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self) -> list[float]:
        """Return the loss of each step, the last where it was taken twice."""
        found = {row["step"]: row["loss"] for row in self.rows()}
        return [found[step] for step in sorted(found)]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def row_of(name: str, run: Run, expected: Sequence[float], lost_steps: int = 0, note: str = "") -> dict[str, Any]:
    """Return the table's row of a finished run, held against the losses of one process."""
    losses, devices = run.losses(), run.count * run.values.devices
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=False)]
    return {
        "run": name,
        "processes": run.count,
        "devices": devices,
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "difference": max(differences, default=0.0),
        "lost_steps": lost_steps,
        "note": note,
    }


def killed(values: Any, count: int, expected: Sequence[float]) -> dict[str, Any]:
    """Kill a worker, start all again from the last save, and return the row."""
    run = Run(values, "killed", count)
    run.finish(kill_after=values.kill_after)
    before = run.rows()[-1]["step"]
    run.count = values.resume_with or count
    run.finish()
    taken = [row["step"] for row in run.rows()]
    lost = len(taken) - len(set(taken))
    return row_of("killed and resumed", run, expected, lost, f"{count} processes, one killed after step {before + 1}")


def misses(rows: Sequence[dict[str, Any]], steps: int, save_every: int) -> list[str]:
    """Return one sentence for each promise that is broken."""
    found = []
    for row in rows:
        if row["steps"] != steps:
            found.append(f"{row['run']}: {row['steps']} steps of {steps}")
        if not row["difference"] <= TOLERANCE:
            found.append(f"{row['run']}: a loss differs by {row['difference']:.2g}")
        if row["lost_steps"] > save_every + 1:  # one save may be under way, and one step be taken beside it
            found.append(f"{row['run']}: {row['lost_steps']} steps were lost, a save is made every {save_every}")
    return found


def main(argv: Sequence[str]) -> int:
    """Run one process, then several, then several with a kill; or be one of the workers."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out = flags.FLAGS, _report.console()
    if values.worker >= 0:
        work(values)
        return 0
    alone = Run(values, "one", 1)
    alone.finish()
    expected = alone.losses()
    rows = [row_of("one process", alone, expected)]
    counts = [int(count) for count in values.processes]
    for count in counts:
        run = Run(values, f"processes{count}", count)
        run.finish()
        rows.append(row_of(f"{count} processes", run, expected))
    if values.kill_after:
        rows.append(killed(values, counts[-1], expected))
    _report.print_table(COLUMNS, rows, f"One step on several processes, {values.strategy}", out)
    _report.write_csv(pathlib.Path(values.out_dir) / "multihost.csv", rows)
    found = misses(rows, values.steps, values.save_every)
    for sentence in found:
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if found else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
