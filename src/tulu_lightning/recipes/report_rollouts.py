"""Responses that a stage sampled while it trained, with the verifier's verdict."""

from collections.abc import Sequence

from tulu_lightning.recipes.records import Rollout
from tulu_lightning.recipes.report_parts import escape
from tulu_lightning.recipes.report_samples import MARKS

__all__ = ["pick_rollouts", "rollouts_section"]

SHOWN_ROLLOUTS = 10


def pick_rollouts(rollouts: Sequence[Rollout], n: int = SHOWN_ROLLOUTS) -> list[Rollout]:
    """`n` rollouts spread evenly from the first step to the last, right and not right in turn, in step order."""
    left = list(rollouts)
    if len(left) <= n:
        return sorted(left, key=lambda r: r.step)
    first, last = min(r.step for r in left), max(r.step for r in left)
    moments = -(-n // 2)  # at each of them one that is right, one that is not
    chosen: list[Rollout] = []
    for i in range(n):
        target = first + (last - first) * (i // 2) / max(moments - 1, 1)
        # The other kind only where this kind has run out.
        best = min(left, key=lambda r, i=i, t=target: ((r.outcome == "right") != (i % 2 == 0), abs(r.step - t)))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda r: r.step)


def rollouts_section(rollouts: Sequence[Rollout]) -> str:
    """Some of each stage's, from its first step to its last."""
    stages = list(dict.fromkeys(rollout.stage for rollout in rollouts))
    body = ""
    for stage in stages:
        chosen = pick_rollouts([rollout for rollout in rollouts if rollout.stage == stage])
        title = f"<h3>{escape(stage)}</h3>" if len(stages) > 1 else ""
        body += f'{title}<div class="rollouts">{"".join(map(_rollout, chosen))}</div>'
    body = body or '<p class="empty">No rollout has been recorded.</p>'
    return f"""<h2 id="rollouts">Sample rollouts</h2>
<p class="lead">Responses sampled in training, from the first step to the last, with the verifier's verdict.</p>{body}"""


def _rollout(rollout: Rollout) -> str:
    known = rollout.outcome in MARKS
    facts = [
        f"score {rollout.score:g}" if rollout.score is not None else "",
        f"reward {rollout.reward:.4g}" if rollout.reward is not None else "",
        f"advantage {rollout.advantage:+.2f}" if rollout.advantage is not None else "",
        f"{rollout.tokens} tokens" if rollout.tokens is not None else "",
        f"finish: {rollout.finish}" if rollout.finish else "",
    ]
    response = escape(rollout.response) if rollout.response else '<span class="empty">(empty)</span>'
    return f"""<article class="card rollout {rollout.outcome if known else ""}">
<header><b>{MARKS.get(rollout.outcome, "·")} {escape(rollout.outcome or "no verdict")}</b><span>step {rollout.step}</span>
<span class="facts">{escape(" · ".join(fact for fact in facts if fact))}</span></header>
<div class="label">Prompt</div><pre class="said">{escape(rollout.prompt)}</pre>
<div class="label">Response</div><pre class="said">{response}</pre></article>"""
