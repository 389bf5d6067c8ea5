"""The keys of ``serve``: the option that each sets, its default, its effect, and whether FP16 is asked again."""

from __future__ import annotations

from fields import cell, code, meanings, page, row

from containers.image.engine_options import ALLOWED, KEYS
from containers.image.serving import Serve, changes_fp16

_DEFAULTS = {"adapters": "none", "variants": "none", "arguments": "none"}


def serving() -> str:
    """Every key of ``serve`` in one table, and the options that ``arguments`` may set."""
    told = meanings(Serve)
    rows = ["| key | option of vLLM | default | effect | FP16 is asked again |", "|---|---|---|---|---|"]
    for name, field in Serve.model_fields.items():
        default = _DEFAULTS.get(name) or code(field.default)
        options = ", ".join(f"`{option}`" for option in KEYS.get(name, ()))
        again = "yes" if changes_fp16(name) else "no"
        rows.append(row(f"`{name}`", options, default, cell(told[name]), again))
    intro = (
        "How a model is served, in a model file's [`serve`](model-file.md#serve); what to do with it is in a "
        "[guide](../how-to/choose-how-a-model-is-served.md)."
    )
    after = (
        "A change of any key but `variants` makes another image, because its command and its label "
        "`slipway.serving` say how it is served; so does a variant's draft model, which is a layer of the image. The "
        "image is evaluated, scanned and load-tested again; the model is quantized again only for another "
        "`chat_template` by which conversations of the calibration are rendered. FP16's answers are kept where the "
        "last column says no. They depend on the keys of the model, and not on those of a scheme or a variant. A "
        "variant is evaluated and load-tested for itself."
    )
    allowed = (
        "## Options that `arguments` may set\n\n"
        + ", ".join(f"`{option}`" for option in sorted(ALLOWED))
        + ".\n\nNot every version of vLLM has every option. All others are refused, also in the forms "
        "`--option=value`, `--option.key` and the beginning of a name."
    )
    return page("How a model is served", intro, ["\n".join(rows), after, allowed])


PAGES = {"reference/serving.md": serving}
