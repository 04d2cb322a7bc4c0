"""launch_tpu.sh: what it does about every way in which a slice, a connection or a run can end."""

import os
import re
import signal

import pytest

from tests.fakes.launching import ACTIVE, FAST, RUN, SLICE, steps, wait_for
from tests.fakes.world import world

pytestmark = pytest.mark.slow

# ---- a slice that is lost


def test_preempted_twice_resumes_the_same_workdir(cloud):
    lost = {"request": ["SUSPENDING", "SUSPENDED"]}
    cloud.world(
        slices=[ACTIVE, {"request": ["PROVISIONING", "ACTIVE"]}, ACTIVE],
        trainers=[{"lines": 2, "change": lost, "exit": 143}, {"lines": 3, "change": lost, "exit": 1}, {"lines": 1}],
    )
    out, err = cloud.launch("up", *RUN, *FAST, "--spot")
    assert steps(out) == [1, 2, 3, 4, 5, 6]
    assert cloud.count("create") == 3
    deletes = cloud.calls("queued-resources", "delete")
    assert len(deletes) == 2
    assert all({"hhh", "--force", "--quiet"} < set(call) for call in deletes)
    assert all("--spot" in call for call in cloud.calls("queued-resources", "create"))
    assert "attempt 1 of 10 in 0 s" in err
    assert "attempt 2 of 10 in 0 s" in err


def test_a_slice_that_vanishes_silently_is_created_again(cloud):
    gone = {"request": ["ACTIVE"], "node": ["PREEMPTED"]}
    cut = {"verb": "follow", "cut_after": 30, "again": False, "change": gone}
    cloud.world(slices=[ACTIVE, ACTIVE], faults=[cut], trainers=[{"lines": 2, "end": "hang"}, {"lines": 1}])
    out, err = cloud.launch("up", *RUN, *FAST)
    assert steps(out)[-1] == 3
    assert "deleting the dead request (request ACTIVE, node PREEMPTED)" in err
    assert cloud.count("create") == 2


def test_retries_have_an_end(cloud):
    lost = {"request": ["SUSPENDED"]}
    cloud.world(slices=[ACTIVE] * 3, trainers=[{"change": lost, "exit": 143}] * 3)
    _, err = cloud.launch("up", *RUN, *FAST, "--max-retries=1", code=75)
    assert (
        "error: the slice was lost, and --max-retries=1 are used up; the same command resumes gs://bucket/runs/hhh"
        in err
    )
    assert cloud.count("create") == 2


def test_pauses_double(cloud):
    failed = {"request": ["FAILED"], "error": "no capacity"}
    cloud.world(slices=[failed, failed, failed, ACTIVE], trainers=[{}])
    sleeps = cloud.root / "tools/sleep"
    sleeps.write_text(f'#!/bin/sh\necho "$1" >>{cloud.root}/sleeps; exec /bin/sleep 0.1\n')
    sleeps.chmod(0o755)
    cloud.launch("up", *RUN, *FAST, "--backoff=700")
    assert [s for s in (cloud.root / "sleeps").read_text().split() if int(float(s)) >= 700] == ["700", "1400", "1800"]


def test_a_failed_request_is_deleted_and_made_again(cloud):
    cloud.world(slices=[{"request": ["PROVISIONING", "FAILED"], "error": "internal"}, ACTIVE], trainers=[{}])
    _, err = cloud.launch("up", *RUN, *FAST)
    assert "hhh is FAILED (internal); attempt 1 of 10" in err
    assert (cloud.count("create"), cloud.count("delete")) == (2, 1)


def test_a_dead_request_from_before_costs_no_attempt(cloud):
    cloud.world(current={"request": ["SUSPENDED"], "type": "v6e-8"}, slices=[ACTIVE], trainers=[{}])
    cloud.launch("up", *RUN, *FAST, "--max-retries=0")
    assert (cloud.count("create"), cloud.count("delete")) == (1, 1)


QUOTA = (
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-b."
)


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        ([{"refuse": QUOTA}], "no quota for v6e-8 (on-demand) in us-east5-b"),
        ([{"request": ["FAILED"], "error": QUOTA}], "no quota for v6e-8 (on-demand) in us-east5-b"),
        (
            [{"refuse": "PERMISSION_DENIED: Permission denied on 'locations/us-east5-b' (or it may not exist)."}],
            "was refused",
        ),
        ([{"refuse": "INVALID_ARGUMENT: accelerator type v6e-8 is not available"}], "was refused"),
    ],
    ids=["quota", "quota_after_a_while", "zone", "type"],
)
def test_what_would_fail_again_is_one_line_and_not_retried(cloud, slices, told):
    cloud.world(slices=[*slices, ACTIVE])
    _, err = cloud.launch("up", *RUN, *FAST, code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert (slices[0].get("refuse") or slices[0]["error"]) in line
    assert cloud.count("create") == 1
    assert cloud.count("delete") == 0


def test_an_api_that_stumbles_is_asked_again(cloud):
    cloud.world(slices=[{"refuse": "UNAVAILABLE: The service is currently unavailable."}, ACTIVE], trainers=[{}])
    cloud.launch("up", *RUN, *FAST)
    assert cloud.count("create") == 2


def test_another_type_under_that_name_is_refused(cloud):
    cloud.world(current={**ACTIVE, "type": "v5litepod-8"})
    _, err = cloud.launch("up", *RUN, *FAST, code=2)
    assert "error: hhh is a v5litepod-8, not a v6e-8; use another --name, or delete it" in err
    assert cloud.count("delete") == 0


def test_a_halted_node_is_left_to_its_owner(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8", "node": ["STOPPED"]})
    _, err = cloud.launch("up", *RUN, *FAST, code=2)
    assert "somebody halted it" in err
    assert cloud.count("delete") == 0


# ---- a connection that breaks


@pytest.mark.parametrize("again", [False, True], ids=["gcloud_gives_up", "gcloud_repeats_the_command"])
@pytest.mark.parametrize("cut_after", [0, 37])
def test_an_interrupted_log_goes_on_where_it_was(cloud, again, cut_after):
    cloud.world(
        slices=[ACTIVE],
        trainers=[{"lines": 4}],
        faults=[{"verb": "follow", "cut_after": cut_after, "again": again}] * 2,
    )
    out, _ = cloud.launch("up", *RUN, *FAST)
    assert steps(out) == [1, 2, 3, 4]
    assert out.count("\n") == 5  # every line once
    assert len(cloud.trained()) == 1  # the run was not touched
    assert cloud.count("create") == 1


def test_a_node_under_repair_is_waited_for(cloud):
    repair = {"node": [*["REPAIRING"] * 15, "READY"]}
    cut = {"verb": "follow", "cut_after": 0, "again": False, "change": repair}
    cloud.world(slices=[ACTIVE], faults=[cut], trainers=[{"lines": 2}])
    out, _ = cloud.launch("up", *RUN, *FAST)
    assert steps(out) == [1, 2]
    assert cloud.count("create") == 1


def test_a_repeated_start_starts_once(cloud):
    fault = {"verb": "start", "cut_after": 5, "again": True}
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, faults=[fault], trainers=[{"lines": 1}])
    cloud.launch("up", *RUN, *FAST)
    assert len(cloud.trained()) == 1


def test_without_a_login_it_is_said_at_once(cloud):
    cloud.world(deaf=1)
    _, err = cloud.launch("up", *RUN, *FAST, code=2)
    assert "error: gcloud has no answer about hhh: gcloud crashed (TransportError): HTTPSConn" in err
    assert len(cloud.calls()) == 1


def test_an_api_that_is_silent_is_no_preemption(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 1, "end": "hang"}])
    process = cloud.start("up", *RUN, *FAST)
    wait_for(cloud.trained)
    with world(cloud.root) as happens:
        happens |= {"deaf": 1000, "faults": [{"verb": "follow", "cut_after": 0, "again": False}] * 1000}
    os.kill(cloud.pid(), signal.SIGTERM)  # so that the log ends
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "hhh did not answer ten times" in err.decode()
    assert (cloud.count("create"), cloud.count("delete")) == (1, 0)


# ---- a run that ends otherwise


def test_a_crash_is_shown_and_not_repeated(cloud):
    cloud.world(slices=[ACTIVE, ACTIVE], workers=2, trainers=[{"lines": 30}, {"lines": 25, "exit": 3}])
    out, err = cloud.launch("up", *RUN, *FAST, code=3)
    assert steps(out)[:2] == [1, 2]  # of worker 0
    assert "error: the run crashed with exit code 3; it is not started again" in err
    assert len(re.findall(r"^\[t1v-n-w-1\] step", err, re.M)) == 19
    assert len(cloud.trained()) == 2
    assert (cloud.count("create"), cloud.count("delete")) == (1, 0)


def test_bad_input_of_the_trainer_keeps_its_exit_code(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{"exit": 2}])
    _, err = cloud.launch("up", *RUN, *FAST, code=2)
    assert "exit code 2" in err


def test_a_failure_with_a_preemption_behind_it_is_retried(cloud):
    later = {"request": ["ACTIVE", "ACTIVE", "SUSPENDED"]}  # the state is late, as it is
    cloud.world(slices=[ACTIVE, ACTIVE], trainers=[{"lines": 1, "exit": 1, "change": later}, {"lines": 1}])
    out, _ = cloud.launch("up", *RUN, "--backoff=0", "--poll=0", "--settle=20")
    assert steps(out) == [1, 2]


def test_a_run_killed_outright_counts_as_crash(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 1, "end": "killed"}])
    cloud.launch("up", *RUN, *FAST, code=137)
    assert len(cloud.trained()) == 1


def test_a_machine_started_anew_runs_again_on_the_same_slice(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 2, "end": "rebooted"}, {"lines": 1}])
    out, _ = cloud.launch("up", *RUN, *FAST)
    assert steps(out) == [1, 2, 3]
    assert cloud.count("create") == 1
    installs = [line for line in (cloud.home() / "uv.log").read_text().splitlines() if "|install|" in line]
    assert len(installs) == 1  # the stamp matched


def test_stop_saves_and_the_waiting_up_ends(cloud):
    cloud.world(slices=[ACTIVE], workers=2, trainers=[{"lines": 1, "end": "hang"}] * 2)
    process = cloud.start("up", *RUN, *FAST)
    wait_for(lambda: len(cloud.trained()) == 2)
    cloud.pid(worker=1)
    for name in ("main", "pid"):  # the terminal is gone, as when tmux is: no reason to end unsaved
        os.kill(cloud.pid(name), signal.SIGHUP)
    _, err = cloud.launch("run", *RUN, code=2)  # a second run beside it
    assert re.search(r"error: run \S+ is live on hhh .*`stop` ends it", err)
    out, _ = cloud.launch("status", *SLICE)
    assert "request hhh in us-east5-b: ACTIVE (v6e-8), node READY" in out
    assert len(re.findall(r"^t1v-n-w-[01] +running ", out, re.M)) == 2
    _, err = cloud.launch("stop", *SLICE)
    assert len(re.findall(r"^@ t1v-n-w-[01] stopped \S+ 143$", err, re.M)) == 2
    out, err = (text.decode() for text in process.communicate(timeout=300))
    assert process.returncode == 143
    assert "stopped on request, and saved" in err
    assert out.endswith("saved\n")
    assert (cloud.count("create"), cloud.count("delete")) == (1, 0)
    _, err = cloud.launch("stop", *SLICE)
    assert "@ t1v-n-w-0 idle" in err


def test_a_trainer_that_does_not_listen_is_ended(cloud):
    deaf = cloud.root / "later/python"
    deaf.write_text("#!/usr/bin/env bash\ntrap : TERM\necho $1 >>~/started\nwhile :; do sleep 0.1; done\n")
    cloud.world(current={**ACTIVE, "type": "v6e-8"})
    cloud.launch("setup", *SLICE)
    cloud.launch("run", *RUN)
    wait_for((cloud.home() / "started").exists)
    cloud.launch("stop", *SLICE, "--grace=0")
    out, _ = cloud.launch("status", *SLICE)
    assert re.search(r"^t1v-n-w-0 +ended +\S+ +137 ", out, re.M)


def test_run_and_logs_apart(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{"lines": 2, "exit": 0}, {"lines": 1, "exit": 4}])
    out, _ = cloud.launch("status", *SLICE)
    assert out.endswith("nothing is set up on its workers\n")
    _, err = cloud.launch("logs", *SLICE, code=2)
    assert "no run was started on hhh" in err
    cloud.launch("setup", *SLICE)
    cloud.launch("run", *RUN)
    assert steps(cloud.launch("logs", *SLICE, *FAST)[0]) == [1, 2]
    cloud.launch("run", *RUN)
    out, err = cloud.launch("logs", *SLICE, *FAST, code=4)
    assert steps(out) == [3]  # the new run's log alone
    assert "crashed with exit code 4" in err


def test_up_again_follows_the_live_run(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 3, "end": "hang"}])
    process = cloud.start("up", *RUN, *FAST)
    assert process.stdout.readline().startswith(b"step 1\t")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "what runs on the workers keeps running" in err.decode()
    process = cloud.start("up", *RUN, *FAST)
    assert process.stdout.readline().startswith(b"step 1\t")
    cloud.launch("stop", *SLICE)
    out, err = process.communicate(timeout=300)
    assert "is live already: following it" in err.decode()
    assert out.endswith(b"saved\n")
    assert len(cloud.trained()) == 1
