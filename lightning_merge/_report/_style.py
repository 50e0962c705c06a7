"""How the page of a report looks, on a desk and on a phone, by day and by night."""

from lightning_merge._report._chart import COLOURS

STYLE = """
:root { color-scheme: light dark; --raw: #767676; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7;
  --c4: #b58900; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --c0: #4aa8e0; --c1: #f0853c; --c2: #2cc49a; --raw: #a0a0a0; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1rem auto; padding: 0 .75rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 0 0 .25rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: currentColor; } svg path { fill: none; stroke-width: 2; }
.grid { stroke: currentColor; stroke-width: 1; opacity: .15; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: .25rem 0; }
.legend, .note { font-size: .9rem; }
svg.swatch { width: 26px; height: 8px; display: inline-block; margin-right: .35rem; vertical-align: middle; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { padding: .2rem .4rem; border-bottom: 1px solid #8884; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:not(:first-child), td:not(:first-child) { white-space: nowrap; }
p { margin: .3rem 0; } .note { opacity: .7; } .best { font-weight: 700; }
""" + "".join(
    f".{each} {{ stroke: var(--{each}); }} circle.{each} {{ fill: var(--{each}); }}\n"
    for each in ("raw", *(f"c{number}" for number in range(COLOURS)))
)
