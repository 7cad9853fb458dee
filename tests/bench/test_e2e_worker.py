"""Which steps of a model runner a profile has, on the CPU."""

from types import SimpleNamespace

import torch

from vllm_ue8m0.bench import e2e_split, e2e_worker

STEP = e2e_split.RANGE + "a step"


def test_a_profile_counts_settled_steps_of_its_rows(monkeypatch):
    traces = []
    monkeypatch.setattr(e2e_split, "split", lambda trace, steps: traces.append(trace) or steps)
    watch = e2e_worker.Watch()
    worker = SimpleNamespace(model_runner=SimpleNamespace(ue8m0_watch=watch))

    def step(rows):
        watch.begin(rows)
        with torch.profiler.record_function(STEP if rows == 4 else "of other rows"):
            torch.zeros(8).sum()
        watch.end()

    for rows in (0, 0, 4, 1, 0):
        step(rows)
    assert watch.profiler is None  # nobody has asked yet
    e2e_worker.profile(worker, 4, 2, 5)
    for rows in (1, 0, *[4] * 9, 0, 1, 4, 4, 4):
        step(rows)
    assert watch.profiler is None and watch.split == 5 and len(traces) == 1
    ranges = [e for e in traces[0]["traceEvents"] if e.get("cat") == "user_annotation"]
    ranges.sort(key=lambda event: event["ts"])
    names = [event["name"] for event in ranges if event["name"] in (STEP, e2e_split.SETTLED)]
    assert names == [STEP] * e2e_worker.SETTLING_STEPS + [e2e_split.SETTLED] + [STEP] * 5
