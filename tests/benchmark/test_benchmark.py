"""Benchmarks: turns are fair, ratios cancel drift, whoever fails is listed, and bytes and errors are true."""

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from fp4dit_ao import capture, quantizer_for
from fp4dit_ao.benchmark import (
    attention,
    bars,
    ceilings,
    exact,
    linears,
    memory,
    peers,
    report,
    sections,
    transformers,
    turns,
)
from fp4dit_ao.benchmark.peers import PEERS, Peer, quantizable
from fp4dit_ao.benchmark.sections import Settings, StepCase
from fp4dit_ao.benchmark.turns import Measured, Ratio, Worker, WorkerFailed, measure
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Workload, error_text, turn
from tests.tiny import CALL, tiny_pipeline

TINY = transformers.PIXART_XL | {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 128,
}  # fmt: skip
ENVIRONMENT = {
    "processor": "a processor", "gpu": "none", "kernel": "avx512vnni", "threads": "2", "torch": "2", "torchao": "0",
    "diffusers": "0",
}  # fmt: skip


def behaves(name, **options):
    """A worker of ``tests.benchmark.workloads``: its class by the first word of ``name``."""
    limit = options.pop("limit", 30.0)
    return Worker(f"tests.benchmark.workloads:{name.split()[0]}", {"name": name, **options}, limit=limit)


class InProcess:
    """Stands for :class:`Worker` where starting processes would only take time."""

    made: list = []  # noqa: RUF012

    def __init__(self, workload, options, environment=None):
        self.workload, self.options, self.environment, self.instance = workload, options, environment or {}, None
        InProcess.made.append(self)

    def ask(self, do, **arguments):
        try:
            with torch.no_grad():
                if self.instance is None:
                    module, _, name = self.workload.rpartition(":")
                    found = {
                        "linears": linears,
                        "attention": attention,
                        "transformers": transformers,
                        "ceilings": ceilings,
                    }[module.split(".")[-1]]
                    self.instance = getattr(found, name)(**json.loads(json.dumps(self.options)))
                result = turn(self.instance) if do == "turn" else getattr(self.instance, do)(**arguments)
                return json.loads(json.dumps(result))
        except Exception as error:
            raise WorkerFailed(error_text(error)) from error

    def tell(self, do, **arguments):
        self.told = do, arguments

    def answer(self):
        do, arguments = self.told
        return self.ask(do, **arguments)

    def close(self):
        self.instance = None


@pytest.fixture
def in_process(monkeypatch):
    """No processes, no compiling; a settled thread count."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sections, "Worker", InProcess)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: None)
    monkeypatch.setattr(ceilings, "_PRODUCTS", [(32, 64, 64)])
    monkeypatch.setattr(ceilings, "_COPIES_MB", (0.1, 1))
    InProcess.made = []
    yield
    torch.set_num_threads(threads)


# --- turns -----------------------------------------------------------------------------------------------------------


def test_variants_take_turns_in_groups_that_all_hold_the_baseline(tmp_path):
    diary = tmp_path / "diary"
    base, *_ = variants = [Variant("Sleeper " + letter) for letter in "abcd"]
    found = list(
        measure(
            variants,
            [base],
            [{"size": 7}],
            lambda v: behaves(v.method, diary=str(diary)),
            rounds=2,
            at_once=3,
            together=True,
        )
    )
    assert "".join(line[-1] for line in diary.read_text().split("\n") if line) == "abcabcadad"
    assert [m.variant for m in found] == variants
    assert all(len(m.seconds) == 2 and m.error is None for m in found)
    assert all(0.02 < second < 1 for m in found for second in m.seconds)
    assert found[0].facts["case"] == {"size": 7} and found[0].facts["finished"]
    assert len({m.facts["pid"] for m in found}) == 4
    assert found[1].beside == {base.label: found[0].seconds}  # same rounds
    assert found[3].beside[base.label] != found[0].seconds  # the baseline ran again beside d


def test_whoever_fails_is_listed_and_disturbs_nobody():
    names = ["Sleeper", "CannotBeMade", "FailsOnce", "Crashes", "Exits", "Hangs"]
    cases = [{"size": 0}, {"size": 1}]
    found = measure(
        [Variant(name) for name in names], [Variant("Sleeper")], cases,
        lambda v: behaves(v.method, limit=2.0 if v.method == "Hangs" else 30.0), rounds=2, at_once=9,
    )  # fmt: skip
    errors = {(m.variant.method, m.case["size"]): m.error for m in found}
    assert len(errors) == 12
    for size in (0, 1):
        assert errors["Sleeper", size] is None
        assert errors["CannotBeMade", size] == "NotImplementedError: needs a GPU of the future."
        assert errors["Crashes", size] == "killed by SIGSEGV; last said: chatter from a library"
        assert errors["Exits", size] == "ended with exit status 3; last said: out of patience"
        assert errors["Hangs", size] == "no answer within 2 s"
    assert errors["FailsOnce", 0] is None
    assert errors["FailsOnce", 1] == "ValueError: FailsOnce takes no size 1"


def test_a_baseline_that_fails_leaves_seconds_without_ratios():
    variants = [Variant("CannotBeMade"), Variant("Sleeper")]
    failed, found = measure(variants, variants[:1], [{}], lambda v: behaves(v.method), rounds=1, at_once=3)
    assert failed.error and found.error is None
    assert found.seconds and found.ratio("CannotBeMade") is None


def test_processes_end_with_the_measurement():
    started = []

    def start(variant):
        started.append(behaves(variant.method))
        return started[-1]

    measuring = measure([Variant("Sleeper a"), Variant("Sleeper b")], [], [{}, {}], start, rounds=1, at_once=3)
    next(measuring)
    processes = [worker._process for worker in started]
    assert all(process.poll() is None for process in processes)
    measuring.close()  # as Ctrl-C would
    assert all(process.poll() is not None for process in processes)


def test_short_calls_are_repeated_and_their_first_is_not_counted(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    class Short(Workload):
        calls = 0

        def run(self):
            self.calls += 1
            clock.now += 0.01 if self.calls == 1 else 0.002

    monkeypatch.setattr("fp4dit_ao.benchmark.worker.time", clock)
    workload = Short()
    assert turn(workload) == pytest.approx(0.002)
    assert workload.calls == 1 + 10  # 0.02 s of calls of 0.002 s


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.01, 100))
def test_ratios_of_a_round_cancel_drift(drift, factor):
    ratio = Ratio.of([d * factor for d in drift], drift)
    for value in (ratio.median, ratio.low, ratio.high):
        assert math.isclose(value, factor, rel_tol=1e-9)


def test_ratio_is_median_and_range():
    ratio = Ratio.of([2, 3, 10], [1, 1, 2])
    assert str(ratio) == "3.00 (2.00 to 5.00)"


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a6", "w4a8", "int_w4a6"])
def test_a_linear_of_ours_is_exact_and_says_so(recipe):
    facts = linears.Linear(recipe, "eager", "cpu", torch.get_num_threads()).prepare(
        out_features=96, in_features=256, tokens=5
    )
    assert facts["bits"] == pytest.approx(4 + 32 / 128)  # a float32 scale for every group of 128
    assert facts["bytes"] == 96 * 256 * facts["bits"] / 8
    assert 0 < facts["deviation"] < 2e-6
    assert 0.01 < facts["error"] < 0.2


@pytest.mark.parametrize(("recipe", "block"), [("mxfp4", 32), ("nvfp4", 16)])
def test_a_linear_in_a_block_format_is_measured(recipe, block):
    """Its deviation is left out: that is of token-wise quantized operands."""
    case = {"out_features": 96, "in_features": 256, "tokens": 5}
    facts = linears.Linear(recipe, "eager", "cpu", torch.get_num_threads()).prepare(**case)
    assert facts["bits"] == pytest.approx(4 + 8 / block, rel=1e-2)  # a byte for every block, and one float of NVFP4
    assert 0.01 < facts["error"] < 0.3 and "deviation" not in facts
    with pytest.raises(ValueError, match="token-wise quantized inputs"):
        linears.Linear(recipe + linears.PRODUCT, "eager", "cpu", 1).prepare(**case)


def test_errors_are_relative_to_float32(in_process):
    weight, x = linears.numbers(64, 128, 3)
    facts = linears.Linear("bfloat16", "eager", "cpu", 1).prepare(out_features=64, in_features=128, tokens=3)
    wanted = F.linear(x.double(), weight.double()).numpy()
    got = F.linear(x.bfloat16(), weight.bfloat16()).double().numpy()
    assert facts["error"] == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-3)
    assert (
        linears.Linear("float32", "eager", "cpu", 1).prepare(out_features=64, in_features=128, tokens=3)["error"] == 0
    )
    assert facts["bits"] == 16


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].installed])
def test_installed_peers_convert_or_say_why(name, in_process):
    linear = linears.Linear(name, "eager", "cpu", 1)
    try:
        facts = linear.prepare(out_features=128, in_features=256, tokens=17)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:
        assert str(error)
        return
    assert 4 <= facts["bits"] < 9
    assert facts["error"] < 0.2
    assert not np.allclose(facts["error"], 0.0029, atol=1e-3)  # bfloat16's own: nothing would have been quantized


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook"])
def test_the_product_alone_is_the_linear_without_quantization_of_tokens(recipe):
    case = {"out_features": 64, "in_features": 256, "tokens": 5}
    product = linears.Linear(recipe + linears.PRODUCT, "eager", "cpu", 1)
    product.prepare(**case)
    weight, x = linears.numbers(64, 256, 5)
    assert torch.equal(product.call()[0], F.linear(x.bfloat16(), linears.low_bit(weight, recipe)))


def test_peers_get_the_linears_that_recipes_quantize():
    model = tiny_pipeline(layers=1).transformer
    quantizer = quantizer_for(model, "w4a6")
    graph = capture(model, transformer_sample(model))
    quantizer.annotate(graph)
    ours = {name for name, d in quantizer.decisions.items() if d.kind == "linear" and d.config}
    assert set(quantizable(model)) == {quantizer.decisions[name].name for name in ours}
    assert len(ours) == 10


def transformer_sample(model):
    return transformers.sample(64, torch.float32, model.config)


def test_bytes_and_bits_are_those_of_the_file(tmp_path):
    model = transformers.quantized(
        tiny_pipeline(layers=1).transformer, transformer_sample(tiny_pipeline().transformer), "w4a6"
    )
    model.save_pretrained(tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    _, facts = transformers.ready(model, Variant("w4a6"))
    assert facts["bytes"] == sum(sizes.values())
    assert facts["bits"] == pytest.approx(4.25)


def test_peak_memory_begins_anew():
    before = memory.reset_peak()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < memory.peak() - before < 100 << 20
    del held
    after = memory.reset_peak()
    assert memory.peak() - after < 20 << 20


def test_a_slow_product_is_tried_at_its_smallest_size_alone(monkeypatch):
    monkeypatch.setattr(ceilings, "_PRODUCTS", [(2, 32, 8), (4, 32, 8)])
    tried = []

    def seconds(self, call):
        tried.append(call().shape[0])
        return 2.0 if call().dtype == torch.int32 else 0.1

    monkeypatch.setattr(ceilings.Ceilings, "_seconds", seconds)
    found = ceilings.Ceilings("cpu", torch.get_num_threads(), repeats=1)
    assert found._products(*ceilings._WAYS["int8"]) == 2 * 32 * 8 / 2.0
    assert tried == [2]
    assert found._products(*ceilings._WAYS["float32"]) == pytest.approx(4 * 32 * 8 / 0.1)
    assert tried == [2, 2, 4]


# --- sections, report ------------------------------------------------------------------------------------------------


def test_everything_is_measured_and_reported(in_process, monkeypatch, tmp_path):
    monkeypatch.setitem(PEERS, "absent", Peer("no-such-package", "no_such_module", lambda model, names: model))
    monkeypatch.setitem(PEERS, "broken", Peer("torch", "torch", refuse))
    monkeypatch.setattr(transformers, "PIXART_XL", TINY)
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "generation.json").write_text(json.dumps(CALL))
    settings = Settings(("w4a6",), ("absent", "broken", "torchao INT8"), "cpu", 1, rounds=1)
    results = bars.Results({"recipes": ["w4a6"], "peers": ["absent", "broken"]}, ENVIRONMENT)
    said = []
    results.ceilings = sections.ceilings(settings)
    results.linears += sections.measure_call(settings, said.append)
    results.linears += sections.measure_linears(settings, *linears.cases("128x128:2,20+peers"), said.append)
    small = [{"heads": 2, "dim": 24, "queries": 65, "keys": 9}]
    results.attention += sections.measure_attention(settings, small, said.append)
    assert [0 <= m.facts["error"] < bound for m, bound in zip(results.attention, (0.01, 1e-6, 0.1), strict=True)] == [
        True
    ] * 3
    results.steps += sections.measure_step(settings, StepCase.parse("64x1+peers"), said.append)
    results.generations += sections.measure_generation(
        settings, str(tmp_path / "float"), ["cat", "dog"], {}, True, said.append
    )
    labels = {m.variant.label for m in results.generations}
    ours = {"w4a6, compiled", "w4a6, compiled by block"}
    floats = {"float32", "bfloat16", "float32, compiled", "bfloat16, compiled", "bfloat16, compiled by block"}
    assert labels == ours | floats | {"broken, compiled", "torchao INT8, compiled"}
    found = {m.variant.label: m for m in results.steps}
    assert found["broken, compiled"].error == "RuntimeError: not today."
    for label, low, high, bits in (
        ("float32, compiled", 0, 1e-9, 32), ("bfloat16, compiled", 1e-4, 0.05, 16), ("w4a6, compiled", 1e-3, 0.3, 4.25),
        ("w4a6, compiled by block", 1e-3, 0.3, 4.25), ("torchao INT8, compiled", 1e-4, 0.1, 8.2),
    ):  # fmt: skip
        facts = found[label].facts
        assert low <= facts["error"] <= high
        assert facts["bits"] == pytest.approx(bits, abs=0.1)
        assert facts["first"] > 0 and facts["load bytes"] >= 0 and facts["run bytes"] >= 0
    caches = [w.environment["TORCHINDUCTOR_CACHE_DIR"] for w in InProcess.made if w.environment]
    assert len(caches) == len(set(caches))  # every first call is a cold one
    text = report.markdown(results)
    assert "| absent" in text and "no-such-package not installed" in text
    assert (
        "- broken, compiled (4 cases, first out features 128, in features 128, tokens 20): RuntimeError: not today."
        in text
    )
    assert "| broken, compiled" in text and "failed" in text
    ours = next(m for m in results.steps if m.variant == results.ours)
    assert ours.facts["error"] < 0.3 and ours.ratio("bfloat16, compiled")
    assert f"{ours.facts['bytes'] / 1e6:.1f}" in text
    again = json.loads(json.dumps(report.to_dict(results)))
    assert statistics.median(again["steps"][0]["seconds"]) == results.steps[0].median
    assert said


def refuse(model, names):
    raise RuntimeError("not today. Nor tomorrow")


def measured(method, case, seconds, mode="eager", facts=None, beside=None):
    return Measured(Variant(method, mode), case, facts or {}, seconds, beside or {})


def test_bars_are_judged_by_the_worst_case():
    case = {"out_features": 1152, "in_features": 1152}
    results = bars.Results({"recipes": ["w4a6"]}, ENVIRONMENT)
    beside = {"torch._int_mm": [1.0], "bfloat16": [2.0], "float32": [4.0]}
    results.linears = [
        measured("w4a6", case | {"tokens": 256}, [1.0], "compiled", {"deviation": 1e-7, "bits": 4.25}, beside),
        measured("w4a6", case | {"tokens": 4096}, [1.25], "compiled", {"deviation": 3e-6, "bits": 4.25}, beside),
        measured("w4a6", case | {"tokens": 1}, [1.0], "compiled", {}, beside),
        measured("SDNQ int8", case | {"tokens": 256}, [9.0], "compiled", {"bits": 8.0}, beside),
    ]
    rows = {(row[0].split(",")[1].strip(), row[1]): row[2:] for row in (bar.row(results) for bar in bars.BARS)}
    assert rows["linear", "speed / torch._int_mm ≥ 0.95"] == ["0.8 (median 0.9 of 2)", "**no**"]
    assert rows["linear", "speed / bfloat16 ≥ 1.8"] == ["1.6 (median 1.8 of 2)", "**no**"]
    assert rows["linear", "speed / bfloat16 ≥ 1.5"] == ["2", "yes"]
    assert rows["linear", "speed / bfloat16 ≥ 1.4"] == ["", "needs H200"]
    assert rows["PixArt-XL step", "speed / compiled bfloat16 ≥ 1.6"] == ["", "not measured"]
    exactness = rows["every recipe's linears", "error against float64 on the same quantized operands ≤ 2e-06"]
    assert exactness == ["3e-06 (median 1.55e-06 of 2)", "**no**"]
    assert rows["every recipe's linears", "bits per quantized weight ≤ 4.3"] == ["4.25 (median 4.25 of 2)", "yes"]


def test_a_step_is_judged_on_the_deepest_model():
    results = bars.Results({"recipes": ["w4a6"]}, ENVIRONMENT)
    for layers, seconds in ((2, 1.0), (28, 4.0)):
        case = {"layers": layers, "pixels": 512}
        results.steps.append(measured("w4a6", case, [seconds], "compiled", {}, {"bfloat16, compiled": [8.0]}))
    row = next(bar.row(results) for bar in bars.BARS if bar.what == "speed / compiled bfloat16" and "512" in bar.where)
    assert row[2:] == ["2", "yes"]


def test_roofline_takes_the_narrowest_way():
    found = {"products": {"int8": 1e9}, "bytes": {"1": 1e9, "100": 1e8}}
    small = ceilings.Roofline.of({"out_features": 1000, "in_features": 1000, "tokens": 1}, 5e5, found, 1e-4)
    assert (small.compute, small.memory) == (pytest.approx(1e-3), pytest.approx(5.04e5 / 1e9))
    assert small.bound == "products" and small.seconds == pytest.approx(1.1e-3)
    large = ceilings.Roofline.of({"out_features": 1000, "in_features": 1000, "tokens": 1}, 2e6, found, 1e-4)
    assert large.bound == "memory" and large.memory == pytest.approx(2.004e6 / 1e8)
    assert ceilings.bandwidth(found, 1e12) == 1e8


@pytest.mark.parametrize(
    "text",
    ["", "flux", "flux:", "flux:0", "12x:3", "12x8:a", "0x8:1", "flux:1+", "flux:1+friends", "nobody:1", "1x2x3:4"],
)
def test_unknown_linears_are_refused(text):
    with pytest.raises(ValueError, match="unknown linear"):
        linears.cases(text)


@pytest.mark.parametrize("text", ["", "512", "512x", "512x0", "x28", "512x28+", "512x28+friends", "ax2"])
def test_unknown_steps_are_refused(text):
    with pytest.raises(ValueError, match="unknown step"):
        StepCase.parse(text)


def test_sizes_are_read():
    cases, beside = linears.cases("128x64:1,2")
    assert cases[0] == {"out_features": 128, "in_features": 64, "tokens": 2} and not beside
    cases, beside = linears.cases("flux:16+peers")
    assert len(cases) == 3 and beside
    assert StepCase.parse("512x2+peers") == StepCase(512, 2, True)
    with pytest.raises(ValueError, match="multiple of 16"):
        StepCase.parse("520x2")


def test_exactness_is_measured_against_the_operands():
    x_hat, w_hat = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    assert exact.error(x_hat, w_hat, None, torch.tensor([[-5.0]])) == 0
    assert exact.error(x_hat, w_hat, torch.tensor([1.0]), torch.tensor([[-4.0 + 0.12]])) == pytest.approx(
        0.01, rel=1e-5
    )
    assert exact.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_a_package_that_is_not_there_is_not_installed():
    peer = Peer("no-such-package", "no_such_parent.module", lambda model, names: model)
    assert not peer.installed and peer.version == "not installed"
    assert peers.PEERS["torchao INT8"].version[0].isdecimal()
    assert turns.LIMIT_SECONDS > 0
