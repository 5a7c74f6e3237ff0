"""The form of each weight: the fastest that memory allows."""

import itertools

import pytest

from fp4dit_ao.evaluation.weight_choice import Form, fastest_forms

PACKED, BYTES, FLOAT = Form("packed", 3.0, 10), Form("fp8", 2.0, 20), Form("bfloat16", 1.0, 40)


@pytest.mark.parametrize(
    ("forms", "memory", "chosen"),
    [
        ([PACKED, BYTES, FLOAT], None, "bfloat16"),
        ([PACKED, BYTES, FLOAT], 30, "bfloat16"),
        ([PACKED, BYTES, FLOAT], 29, "fp8"),
        ([PACKED, BYTES, FLOAT], 9, None),
        ([PACKED, BYTES, FLOAT], -5, None),
        ([PACKED, Form("fp8", 3.0, 20)], None, None),  # no faster
        ([PACKED, Form("fp8", 4.0, 20), FLOAT], 100, "bfloat16"),
        ([PACKED, Form("small", 2.5, 8)], -5, "small"),
    ],
)
def test_one_layer(forms: list[Form], memory: int | None, chosen: str | None) -> None:
    assert fastest_forms({"one": forms}, memory) == ({} if chosen is None else {"one": chosen})


def test_memory_goes_to_where_a_byte_saves_most() -> None:
    layers = {
        "much for much": [Form("packed", 10.0, 100), Form("fp8", 5.0, 200)],
        "little for little": [Form("packed", 1.0, 10), Form("fp8", 0.2, 20)],
        "dear": [Form("packed", 1.0, 100), Form("fp8", 0.9, 200)],
    }
    assert fastest_forms(layers, 115) == {"much for much": "fp8", "little for little": "fp8"}
    assert fastest_forms(layers, 100) == {"little for little": "fp8"}
    assert set(fastest_forms(layers, 210)) == set(layers)


def test_more_memory_never_makes_it_slower_and_is_never_exceeded() -> None:
    layers = {
        name: [Form("packed", 4.0 + i, 10 * i), Form("fp8", 3.0, 20 * i), Form("bfloat16", 2.5 + i / 2, 40 * i)]
        for i, name in enumerate("abcd", 1)
    }
    took = []
    for memory in range(0, 320, 5):
        chosen = fastest_forms(layers, memory)
        now = {
            name: next(form for form in forms if form.name == chosen.get(name, "packed"))
            for name, forms in layers.items()
        }
        assert sum(now[name].bytes - layers[name][0].bytes for name in layers) <= memory
        took.append(sum(form.seconds for form in now.values()))
    best = sum(min(form.seconds for form in forms) for forms in layers.values())
    assert took[0] == sum(forms[0].seconds for forms in layers.values()) and took[-1] == best
    exhaustive = min(sum(f.seconds for f in pick) for pick in itertools.product(*layers.values()))
    assert exhaustive == best
