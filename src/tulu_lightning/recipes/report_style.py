"""The report's style sheet and its one script. Both are inlined: the page asks the network for nothing."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --soft: #5b6472; --line: #e1e5ea;
  --blue: #2a66bd; --good: #127a63; --bad: #b8324a; --warn: #8a5a00; --warn-page: #fff6e0; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1115; --card: #171a21; --ink: #e7eaf0; --soft: #9aa4b2;
  --line: #2a2f39; --blue: #7db0f5; --good: #43c3a6; --bad: #f0788e; --warn: #e5b455; --warn-page: #2a2413;
  --code: #0f1217; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 32px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 14px; }
h3 { font-size: 16px; margin: 28px 0 10px; }
h3 small, .lead, figcaption small, .facts, .detail { color: var(--soft); font-weight: 400; }
.lead { margin: 0 0 14px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
code { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 26px; font-size: 14px; }
nav a { color: var(--blue); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.card, .chart, .tile, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile { padding: 14px 16px; }
.tile header { display: flex; justify-content: space-between; align-items: baseline; gap: 8px; font-weight: 600; }
.tile strong { display: block; font-size: 30px; line-height: 1.25; letter-spacing: -.02em; margin-top: 6px;
  font-variant-numeric: tabular-nums; }
.tile .detail { font-size: 14px; }
.chip { font-size: 12px; font-weight: 500; color: var(--soft); }
.chip.unfinished { color: var(--warn); }
.up { color: var(--good); } .down { color: var(--bad); }
.notes { background: var(--warn-page); border: 1px solid var(--line); border-left: 4px solid var(--warn);
  border-radius: 10px; padding: 12px 16px; margin: 0 0 16px; font-size: 14px; }
.notes ul { margin: 4px 0 0; padding-left: 20px; }
.notes li { overflow-wrap: anywhere; }
.chart { margin: 0; padding: 14px 14px 8px; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 12px; }
figcaption { font-size: 14px; line-height: 1.35; margin-bottom: 6px; min-height: 2.7em; }
figcaption small { font-size: 13px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-top: 4px; }
.key { display: inline-flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.key i { width: 10px; height: 10px; border-radius: 3px; flex: none; }
.plot { min-width: 0; }
.plot text { fill: var(--soft) !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
.plot .textpoint text { fill: var(--ink) !important; }
.plot .hoverlayer text { fill: #fff !important; }
.card { overflow: hidden; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 10px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
.scores th.n, .scores td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.scores .detail { display: block; font-size: 13px; }
.scores tbody th .detail { white-space: nowrap; }
.scores tbody th { color: var(--ink); font-size: 14px; }
.alerts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.alert { padding: 12px 16px; border-left: 4px solid var(--warn); font-size: 14px; overflow-wrap: anywhere; min-width: 0; }
.alert small { color: var(--soft); font-size: 13px; } .alert p { margin: 4px 0; } .alert a { color: var(--blue); font-size: 13px; }
.under { color: var(--soft); font-size: 13px; margin: 8px 0 10px; overflow-wrap: anywhere; }
.card td, .card tbody th { overflow-wrap: anywhere; }
.scores td:not(.n) { min-width: 7.5em; }
.changes th[scope="row"] { width: 40%; } .changes td { width: 30%; }
.more { margin-top: 12px; }
h1 small { font-size: 20px; color: var(--soft); font-weight: 400; letter-spacing: 0; }
.samples { display: grid; gap: 12px; }
.sample { padding: 14px 16px; min-width: 0; }
.sample > .said { background: none; padding: 0; font-family: inherit; font-size: 15px; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap: 10px; margin-top: 10px; }
.answer { border-left: 3px solid var(--soft); padding-left: 10px; min-width: 0; }
.answer.right { border-left-color: var(--good); } .answer.wrong { border-left-color: var(--bad); }
.answer header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; font-size: 13px; margin-bottom: 4px; }
.answer header span { color: var(--soft); }
.answer.right header span { color: var(--good); } .answer.wrong header span { color: var(--bad); }
.answer .said { max-height: 200px; }
.facts-table td { overflow-wrap: anywhere; }
.facts-table th { width: 11em; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; align-items: start; }
.lengths { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 12px; align-items: start; }
.lengths .facts-table th { width: 10em; }
.charts + .lengths { margin-top: 12px; }
.rollouts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.rollout { padding: 14px 16px; border-left: 4px solid var(--soft); min-width: 0; }
.rollout.right { border-left-color: var(--good); } .rollout.wrong { border-left-color: var(--bad); }
.rollout header { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; font-size: 14px; }
.rollout header b { color: var(--soft); }
.rollout.right header b { color: var(--good); } .rollout.wrong header b { color: var(--bad); }
.facts { font-size: 13px; }
.label { color: var(--soft); font-size: 12px; margin: 8px 0 2px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.said { background: var(--code); border-radius: 6px; padding: 8px 10px; max-height: 260px; overflow: auto;
  unicode-bidi: isolate; }
details { margin: 0 0 10px; }
summary { cursor: pointer; padding: 11px 16px; font-weight: 600; font-size: 14px; }
summary small { color: var(--soft); font-weight: 400; overflow-wrap: anywhere; }
details > pre { padding: 4px 16px 16px; overflow: auto; }
details > .card { border-width: 1px 0 0; border-radius: 0 0 10px 10px; }
details > .charts { padding: 4px 12px 12px; }
.empty { color: var(--soft); margin: 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 700px) {
  main { padding: 24px 14px 48px; } h1 { font-size: 26px; } h2 { margin-top: 36px; } figcaption { min-height: 0; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile { padding: 12px; } .tile strong { font-size: 24px; }
  .lengths { grid-template-columns: minmax(0, 1fr); }
  .scores thead { display: none; }
  .scores tr { display: block; padding: 12px 14px; border-bottom: 1px solid var(--line); }
  .scores tbody tr:last-child { border-bottom: 0; }
  .scores tbody th { display: block; border: 0; padding: 0 0 4px; font-size: 16px; }
  .scores td, .scores td.n { display: grid; grid-template-columns: 7.5em 1fr; border: 0; padding: 3px 0; text-align: left;
    white-space: normal; }
  .scores td:not(.n) { min-width: 0; }
  .changes th[scope="row"], .changes td { width: auto; }
  .scores td::before { content: attr(data-label); color: var(--soft); }
  .facts-table th { width: 7.5em; } th, td { padding: 8px 12px; }
}
@media print { body { background: #fff; } nav { display: none; } .chart, .rollout, .tile { break-inside: avoid; } }
"""

# A chart drawn inside a closed <details> has no width to fill: fit it when the reader opens it.
SCRIPT = """
document.querySelectorAll("details").forEach(box => box.addEventListener("toggle", () => {
  if (box.open) box.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.Plots.resize(plot));
}));
"""
