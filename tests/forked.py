"""Functions and the command line in processes of their own, which need not import everything anew."""

import multiprocessing
import os
import socket
import sys

PRELOADED = [
    "experiments.__main__",
    "experiments.verbs",
    "lightning_modules.heat",
    "lightning_modules.variational_metric",
    "datamodules.digits",
    "wandb",
]


def run(target, *args, processes=1, log=os.devnull, timeout=120):
    """Call a function of a module in several processes, one group to Lightning; return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    environments = [group | {"LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    started = [context.Process(target=_begin, args=(environment, log, target, args)) for environment in environments]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        process.kill()  # one that hangs; its exit code says so
        process.join()
    return [process.exitcode for process in started]


def command(folder, *args, processes=1):
    """Run a command in a tree of run folders, and of modules; return exit codes, and what was printed."""
    log = folder / "output.txt"
    log.unlink(missing_ok=True)
    strategy = "ddp" if processes > 1 else "auto"
    args += ("--trainer.strategy", strategy, "--trainer.devices", str(processes))
    codes = run(_command, folder, args, processes=processes, log=log)
    return codes, log.read_text()


def _begin(environment, log, target, args):
    os.environ |= environment
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    from pytorch_lightning.utilities import rank_zero_only

    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # which it read from another process's environment
    target(*args)


def _command(folder, args):
    import backbones.weights
    import experiments.cli
    from experiments.__main__ import main

    sys.path.insert(0, str(folder))
    backbones.weights.CHECKPOINTS = experiments.cli.CHECKPOINTS = folder
    sys.exit(main(args))
