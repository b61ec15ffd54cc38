"""The style sheet of the report's page, light and dark."""

CSS = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1e22;--faint:#656a73;--line:#dfe2e6;
--soft:#f3f4f6;--mark:#cfe8d5}
@media (prefers-color-scheme:dark){:root{--page:#16181d;--ink:#e4e6ea;--faint:#9aa0aa;
--line:#3a3f48;--soft:#1e2127;--mark:#1f4a33}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:1.2rem 1rem 3rem;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,Helvetica,Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0 1rem}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
h3{font-size:.95rem;margin:1.4rem 0 .4rem;color:var(--faint);font-weight:600}
p{max-width:46rem;margin:.5rem 0}
.note{border-left:3px solid #d55e00;padding-left:.7rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .9rem .35rem 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--faint);font-size:.85rem;vertical-align:bottom}
figure{margin:1rem 0}
figure>svg{display:block;width:100%;height:auto;max-width:560px}
figure svg text{font-family:system-ui,Helvetica,Arial,sans-serif!important}
figcaption{color:var(--faint);font-size:.87rem;max-width:40rem;margin-top:.3rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair>*{min-width:0}
@media (max-width:760px){.pair{grid-template-columns:1fr}}
pre{background:var(--soft);padding:.7rem;margin:0;border-radius:4px;
white-space:break-spaces;overflow-wrap:anywhere;
font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;tab-size:4}
pre span{color:var(--faint)}
mark{background:var(--mark);color:inherit}
.what{font-size:.8rem;color:var(--faint);margin-bottom:.2rem}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.6rem;color:var(--faint);
font-size:.85rem}
footer p{max-width:none}
"""
