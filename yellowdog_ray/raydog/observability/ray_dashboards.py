"""Write the Grafana dashboards that the installed Ray has, without a running Ray.

Which there are, and what the functions that make them return, differs between versions of Ray.
"""

import json
import re
import sys
from pathlib import Path

place = Path(sys.argv[1])
try:
    import ray
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory
except ImportError as error:
    sys.exit(f"Ray's Grafana dashboards cannot be had: {error}. They come with a ray[default] on this node")
place.mkdir(parents=True, exist_ok=True)
written = []
for name in sorted(dir(factory)):
    made = re.fullmatch(r"generate_(\w+)_grafana_dashboard", name)
    if not made:
        continue
    try:
        content = getattr(factory, name)()
        text = content if isinstance(content, str) else content[0]
        json.loads(text)
        place.joinpath(f"{made[1]}.json").write_text(text)
        written.append(made[1])
    except Exception as error:
        print(f"No Grafana dashboard {made[1]}: {type(error).__name__}: {error}", file=sys.stderr)
if not written:
    sys.exit(f"Ray {ray.__version__} has no Grafana dashboards where this script looks for them")
print(f"Grafana has the dashboards of Ray {ray.__version__}: {', '.join(written)}")
