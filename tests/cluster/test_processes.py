"""Ending every process below one, also orphans and those that ignore SIGTERM."""

import json
import subprocess
import sys
import textwrap

from server_process import PATIENCE_S

PROGRAM = textwrap.dedent(
    """
    import json, subprocess, sys
    from flyray.cluster.processes import adopt_orphans, descendants, end_descendants

    sleeper = "import signal, sys; {}; print('up', flush=True); signal.pause()"
    deaf = sleeper.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    # A process in a session of its own, whose parent has ended when this returns.
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"

    adopt_orphans()
    spared = subprocess.Popen([sys.executable, "-c", sleeper.format("0")], stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", sleeper.format("0")], stdout=subprocess.PIPE, text=True)
    parent = subprocess.Popen([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True)
    for process in (spared, child, parent):
        process.stdout.readline()
    parent.wait()
    before = descendants()
    count = end_descendants(spare=[spared.pid], grace_s=0.2)
    after = descendants()
    spared.kill()
    spared.wait()
    print(json.dumps([len(before), count, sorted(after) == [spared.pid], len(descendants())]))
    """
)


def test_orphans_and_the_deaf_are_ended_and_the_spared_stay():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert json.loads(run.stdout) == [3, 2, True, 0]


CLUSTER = textwrap.dedent(
    """
    import os

    before = dict(os.environ)
    from flyray.cluster.local_ray import LocalRay
    from flyray.cluster.processes import descendants

    with LocalRay(1) as cluster:
        import ray

        assert ray.get(ray.remote(lambda: os.getpid()).remote()) in descendants()
    assert not cluster.folder.exists()
    assert not descendants()
    settings = ("TMPDIR", "RAY_USAGE_STATS_ENABLED")
    assert [os.environ.get(name) for name in settings] == [before.get(name) for name in settings]
    """
)


def test_a_local_cluster_leaves_no_process_file_or_setting():
    run = subprocess.run([sys.executable, "-c", CLUSTER], capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stderr
