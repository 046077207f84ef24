"""Commands run in forks of a process that has imported what they need.

Reads `{"command", "arguments", "environment"}` a line, and answers with the exit code and what the
command printed.
"""

import json
import os
import runpy
import sys
import tempfile

# The imports are what takes seconds.
import deepsc_jax.benchmark
import deepsc_jax.demo
import deepsc_jax.evaluate
import deepsc_jax.gain
import deepsc_jax.inference.predictor
import deepsc_jax.plan
import deepsc_jax.prepare
import deepsc_jax.train
import deepsc_jax.training.job  # noqa: F401
from deepsc_jax.runtime.entry import ALLOCATOR


def serve(request: dict) -> dict:
    """Run one command in a child."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.environ.update(ALLOCATOR | request["environment"])
            command = request["command"]
            sys.argv = [command, *request["arguments"]]
            sys.orig_argv = [sys.executable, "-m", f"deepsc_jax.{command}", *request["arguments"]]
            for module in [name for name in sys.modules if name == f"deepsc_jax.{command}"]:
                del sys.modules[module]
            code = 0
            try:
                runpy.run_module(f"deepsc_jax.{command}", run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
                code = 98
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return {"code": code, "said": output.read().decode(errors="replace")}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
