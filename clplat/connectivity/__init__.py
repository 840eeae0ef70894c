"""Mode connectivity: the loss on straight lines between the weights that a run had after its tasks.

    clplat analyze connectivity runs/…/er-s0      # needs checkpoint.snapshots: boundary

    θ(α) = (1 − α) θ_i + α θ_j        barrier = max_α [L(θ(α)) − ((1 − α) L(θ_i) + α L(θ_j))]

Two minima count as connected where the barrier is at most 5 % of the mean loss of the ends. A convex loss has none.
After Ren et al. 2024 (arXiv:2402.18865), whose grids and measures are not known to us: these are our own.

    analysis   `analyze` a run, and `write` what was found as tables and a picture
    ├── lines      snapshots, what lies between two of them, and the walk from one to the other
    ├── products   lines between the changes B·A of low-rank adapters, whose factors move together
    └── measure    the losses at a place of a line
"""
