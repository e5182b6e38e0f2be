"""
Slow twins of the optimizers: each update in its paper's letters, one tensor at a time, with nothing clever.

They define what every implementation must give; tests step both side by side. Written from the papers, not from
`rules.py`: there coefficients are folded together, here every bias correction stands where its paper has it.

Each twin takes the gradient `g`, the state `s` (a dict, empty before the first step) and the hyperparameters of the
group, and returns the step that is subtracted from the parameter. [`reference_step`] adds weight decay and masking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


State = dict[str, Any]


def sgd(
    g: Tensor,
    s: State,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    momentum_form: str,
) -> Tensor:
    """Sutskever et al. 2013 for the velocity form; the documentation of `torch.optim.SGD` for the other."""
    if momentum == 0:
        return lr * g
    mu, tau, eta = momentum, dampening, lr
    if momentum_form == "velocity":
        s["v"] = mu * s["v"] + eta * (1 - tau) * g if "v" in s else eta * g
        return mu * s["v"] + eta * g if nesterov else s["v"]
    s["b"] = mu * s["b"] + (1 - tau) * g if "b" in s else g
    return eta * (g + mu * s["b"]) if nesterov else eta * s["b"]


def signum(g: Tensor, s: State, *, lr: float, momentum: float) -> Tensor:
    """Bernstein et al. 2018, Algorithm 2."""
    beta, delta = momentum, lr
    s["m"] = beta * s.get("m", 0) + (1 - beta) * g
    return delta * torch.sign(s["m"])


def lion(g: Tensor, s: State, *, lr: float, betas: tuple[float, float]) -> Tensor:
    """Chen et al. 2023, Algorithm 2."""
    (beta1, beta2), eta = betas, lr
    m = s.get("m", torch.zeros_like(g))
    c = beta1 * m + (1 - beta1) * g
    s["m"] = beta2 * m + (1 - beta2) * g
    return eta * torch.sign(c)


def qhm(g: Tensor, s: State, *, lr: float, momentum: float, nu: float) -> Tensor:
    """Ma and Yarats 2019, eq. 3 and 4."""
    beta, alpha = momentum, lr
    s["g"] = beta * s.get("g", 0) + (1 - beta) * g
    return alpha * ((1 - nu) * g + nu * s["g"])


def adamw(g: Tensor, s: State, *, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Kingma and Ba 2015, Algorithm 1."""
    (beta1, beta2), alpha = betas, lr
    s["t"] = s.get("t", 0) + 1
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    m_hat = s["m"] / (1 - beta1 ** s["t"])
    v_hat = s["v"] / (1 - beta2 ** s["t"])
    return alpha * m_hat / (v_hat.sqrt() + eps)


def qhadam(
    g: Tensor, s: State, *, lr: float, betas: tuple[float, float], nus: tuple[float, float], eps: float
) -> Tensor:
    """Ma and Yarats 2019, eq. 12 to 14."""
    (beta1, beta2), (nu1, nu2), alpha = betas, nus, lr
    s["t"] = s.get("t", 0) + 1
    s["g"] = beta1 * s.get("g", 0) + (1 - beta1) * g
    s["s"] = beta2 * s.get("s", 0) + (1 - beta2) * g**2
    g_prime = s["g"] / (1 - beta1 ** s["t"])
    s_prime = s["s"] / (1 - beta2 ** s["t"])
    return alpha * ((1 - nu1) * g + nu1 * g_prime) / (((1 - nu2) * g**2 + nu2 * s_prime).sqrt() + eps)


def nadamw(g: Tensor, s: State, *, lr: float, betas: tuple[float, float], eps: float, momentum_decay: float) -> Tensor:
    """Dozat 2016, Algorithm 2, with its schedule of mu and psi = `momentum_decay`."""
    (beta1, beta2), gamma, psi = betas, lr, momentum_decay
    t = s["t"] = s.get("t", 0) + 1
    mu_t = beta1 * (1 - 0.5 * 0.96 ** (t * psi))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * psi))
    s["product"] = s.get("product", 1) * mu_t
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    m_hat = mu_next * s["m"] / (1 - s["product"] * mu_next) + (1 - mu_t) * g / (1 - s["product"])
    v_hat = s["v"] / (1 - beta2**t)
    return gamma * m_hat / (v_hat.sqrt() + eps)


def ademamix(
    g: Tensor,
    s: State,
    *,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    alpha_warmup: int | None,
    beta3_warmup: int | None,
) -> Tensor:
    """Pagliardini et al. 2024, Algorithm 1; the schedule of beta3 by half-lives, as the text derives it."""
    (beta1, beta2, beta3), eta = betas, lr
    t = s["t"] = s.get("t", 0) + 1
    alpha_t = alpha * min(1, t / alpha_warmup) if alpha_warmup else alpha
    beta3_t = beta3
    if beta3_warmup:
        share = min(1, t / beta3_warmup)
        half_life = (1 - share) / -_log2(beta1) + share / -_log2(beta3)  # steps until half is forgotten
        beta3_t = 0.5 ** (1 / half_life)
    s["m1"] = beta1 * s.get("m1", 0) + (1 - beta1) * g
    s["m2"] = beta3_t * s.get("m2", 0) + (1 - beta3_t) * g
    s["nu"] = beta2 * s.get("nu", 0) + (1 - beta2) * g**2
    m1_hat = s["m1"] / (1 - beta1**t)
    nu_hat = s["nu"] / (1 - beta2**t)
    return eta * (m1_hat + alpha_t * s["m2"]) / (nu_hat.sqrt() + eps)


def adan(g: Tensor, s: State, *, lr: float, betas: tuple[float, float, float], eps: float) -> Tensor:
    """Xie et al. 2022, Algorithm 1, with their beta_i = 1 - betas[i] and the bias corrections of their code."""
    beta1, beta2, beta3 = (1 - beta for beta in betas)
    t = s["t"] = s.get("t", 0) + 1
    difference = g - s.get("g", g)
    s["m"] = (1 - beta1) * s.get("m", 0) + beta1 * g
    s["v"] = (1 - beta2) * s.get("v", 0) + beta2 * difference
    s["n"] = (1 - beta3) * s.get("n", 0) + beta3 * (g + (1 - beta2) * difference) ** 2
    s["g"] = g.clone()
    m_hat, v_hat, n_hat = (s[key] / (1 - b**t) for key, b in zip("mvn", betas, strict=True))
    return lr * (m_hat + (1 - beta2) * v_hat) / (n_hat.sqrt() + eps)


def adopt(g: Tensor, s: State, *, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Taniguchi et al. 2024, Algorithm 2, with clipping at t^(1/4)."""
    (beta1, beta2), alpha = betas, lr
    if "v" not in s:
        s["t"], s["m"], s["v"] = 0, torch.zeros_like(g), g**2
        return torch.zeros_like(g)
    s["t"] += 1
    c = s["t"] ** 0.25
    normalized = torch.clamp(g / torch.clamp(s["v"].sqrt(), min=eps), -c, c)
    s["m"] = beta1 * s["m"] + (1 - beta1) * normalized
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
    return alpha * s["m"]


def mars(
    g: Tensor, s: State, *, lr: float, betas: tuple[float, float], eps: float, gamma: float, max_norm: float
) -> Tensor:
    """Yuan et al. 2024, Algorithm 2, approximate form."""
    (beta1, beta2), eta = betas, lr
    t = s["t"] = s.get("t", 0) + 1
    c = g + gamma * beta1 / (1 - beta1) * (g - s.get("g", g))
    s["g"] = g.clone()
    if (norm := c.norm()) > max_norm:
        c = c * max_norm / norm
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * c
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * c**2
    return eta * (s["m"] / (1 - beta1**t)) / ((s["v"] / (1 - beta2**t)).sqrt() + eps)


def orthogonalize(m: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: X <- aX + b(XX^T)X + c(XX^T)^2 X."""
    a, b, c = coefficients
    x = m / m.norm().clamp(min=eps)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def muon(
    g: Tensor,
    s: State,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str,
) -> Tensor:
    """Jordan et al. 2024; the scale of Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4."""
    mu = momentum
    s["b"] = mu * s.get("b", 0) + (1 - mu) * g
    o = orthogonalize((1 - mu) * g + mu * s["b"] if nesterov else s["b"], ns_coefficients, ns_steps, eps)
    rows, columns = g.shape
    size = {"original": max(1, rows / columns) ** 0.5, "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5}[
        adjust_lr_fn
    ]
    return lr * size * o


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "sgd": sgd,
    "signum": signum,
    "lion": lion,
    "qhm": qhm,
    "adamw": adamw,
    "qhadam": qhadam,
    "nadamw": nadamw,
    "ademamix": ademamix,
    "adan": adan,
    "adopt": adopt,
    "mars": mars,
}


def reference_step(
    name: str,
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    *,
    weight_decay: float = 0.0,
    decay_form: str = "decoupled",
    cautious: bool = False,
    **hyperparameters: Any,
) -> Tensor:
    """
    One step of an elementwise optimizer.

    Args:
        name (`str`):
            A name in `REFERENCES`.
        parameter (`torch.Tensor`):
            The parameter, of any shape; not changed.
        gradient (`torch.Tensor`):
            Its gradient, of that shape.
        state (`dict`):
            Empty before the first step, then as the last call left it.
        hyperparameters:
            As in a parameter group, with `lr`.

    Returns:
        `torch.Tensor`: the new parameter.
    """
    p, lam, lr = parameter, weight_decay, hyperparameters["lr"]
    g = gradient + lam * p if decay_form == "l2" else gradient
    is_first = not state
    u = REFERENCES[name](g, state, **hyperparameters)
    if cautious:
        phi = (u * g > 0).to(u.dtype)
        u = u * phi * (phi.numel() / (phi.sum() + 1))
    if decay_form == "l2" or lam == 0 or (name == "adopt" and is_first):
        return p - u
    if name == "adan":
        return (p - u) / (1 + lr * lam)
    return p - lr * lam * p - u


def _log2(value: float) -> float:
    return float(torch.log2(torch.tensor(value, dtype=torch.float64)))
