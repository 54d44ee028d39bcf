"""The page that a report is put into. It asks no network for anything and needs no script."""

from __future__ import annotations

from string import Template

from sophia_levanter.reporting.axes import AXES

_SHOWN = ",\n".join(f"#against-{axis.key}:checked ~ .against-{axis.key}" for axis in AXES)
_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #1b1f24; background: #fff; max-width: 1240px; margin: 0 auto; padding: 20px 24px 60px;
}}
h1 {{ font-size: 24px; margin: 0; }}
h2 {{ font-size: 18px; margin: 36px 0 10px; }}
h3 {{ font-size: 14px; margin: 0 0 4px; }}
.made {{ color: #6a737d; margin: 2px 0 16px; font-size: 13px; }}
.note {{ background: #fff6e0; border-left: 4px solid #E69F00; padding: 8px 12px; margin: 8px 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 5px 10px; border-bottom: 1px solid #e3e6ea; vertical-align: top; }}
thead th {{
  color: #57606a; font-weight: 600; border-bottom: 2px solid #c8ced4; vertical-align: bottom; max-width: 220px;
}}
tbody th {{ font-weight: 600; }}
td {{ overflow-wrap: anywhere; }}
.headline {{ width: 100%; }}
.headline td {{ white-space: nowrap; overflow-wrap: normal; }}
.headline th:first-child {{ position: sticky; left: 0; background: #fff; }}
.headline td:nth-child(2) {{ white-space: normal; min-width: 100px; }}
.headline .number {{ text-align: right; }}
.headline strong {{ background: #dff2e4; border-radius: 3px; padding: 1px 5px; margin-right: -5px; }}
.headline small {{ color: #a04300; font-weight: 600; }}
.name {{
  display: inline-flex; align-items: center; gap: 7px; width: max-content; max-width: 220px; overflow-wrap: anywhere;
}}
.name img {{ width: 32px; height: 11px; flex: none; }}
.legend {{
  position: sticky; top: 0; z-index: 1; background: #fffffff2; display: flex; flex-wrap: wrap; gap: 2px 22px;
  padding: 8px 0; font-size: 13px; max-height: 76px; overflow-y: auto; border-bottom: 1px solid #e3e6ea;
}}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 24px 28px; }}
.small {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }}
figure {{ margin: 0; }}
figure img {{ width: 100%; display: block; }}
figcaption, .none {{ color: #57606a; font-size: 13px; margin: 2px 0 0; }}
.losses input {{ position: absolute; opacity: 0; }}
.losses label {{
  display: inline-block; padding: 4px 14px; margin: 12px 0 14px -1px; border: 1px solid #b8c0c8; cursor: pointer;
  font-size: 13px;
}}
.losses input:checked + label {{ background: #0072B2; border-color: #0072B2; color: #fff; }}
.losses input:focus-visible + label {{ outline: 3px solid #56B4E9; }}
.losses .against {{ color: #57606a; font-size: 13px; margin-right: 10px; }}
.losses .grid {{ display: none; }}
{_SHOWN} {{ display: grid; }}
.differing tbody tr {{ background: #fffaf0; }}
.differing tbody th {{ border-left: 4px solid #E69F00; }}
details {{ margin: 12px 0; }}
summary {{ cursor: pointer; color: #0550ae; }}
@media print {{
  body {{ padding: 0; max-width: none; font-size: 12px; }}
  .losses .grid {{ display: grid; margin-bottom: 16px; }}
  .losses label, .losses .against {{ display: none; }}
  .legend {{ position: static; max-height: none; }}
  table {{ font-size: 9px; }}
  th, td {{ padding: 2px 4px; }}
  .headline td {{ white-space: normal; }}
  .wide {{ overflow: visible; }}
  figure, tr {{ break-inside: avoid; }}
  .grid {{ grid-template-columns: 1fr 1fr; }}
  * {{ print-color-adjust: exact; }}
}}
"""
_BODY = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>STYLE</style>
</head>
<body>
<h1>$heading</h1>
<p class="made">$made</p>
$notes
<div class="wide">$headline</div>
<h2>Losses</h2>
<div class="legend">$legend</div>
$losses
<h2>How the steps went</h2>
<div class="grid small">$others</div>
<h2>Configuration</h2>
$differing
<details><summary>$num_same $fields</summary><div class="wide">$same</div></details>
<h2>Text and machine</h2>
<div class="wide">$facts</div>
</body>
</html>
"""
PAGE = Template(_BODY.replace("STYLE", _STYLE))
