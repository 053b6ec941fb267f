"""The equations of ALLO as pure functions of log-probabilities: no model, tokenizer or config.

    pi_theta  the policy being trained          x       prompt
    pi_ref    the policy at the stage's start   y       response, y_t its t-th token
    beta      how strongly pi_ref holds (0.1)   y+, y-  chosen, rejected response
    sigma     the logistic function             n       tokens of a response, its EOS included
    B         responses, or pairs of them       T       tokens of the longest response

ALLO's own come first, then those of the methods it is compared with.

Arguments are tensors; beta, alpha, gamma, delta and fraction are numbers. Every loss is one value
per row or token, never a mean: the loop in train.py divides by the units of the *whole* step, so
that splitting a step into micro-batches changes nothing (departure f).
"""

import math
from fractions import Fraction

import torch.nn.functional as F


def sft_loss(token_logps):
    """-log pi_theta(y_t | x, y_<t).  token_logps [B,T] -> [B,T]."""
    return -token_logps


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, eq. 7):

        -log sigma( beta [ log pi_theta(y+)/pi_ref(y+) - log pi_theta(y-)/pi_ref(y-) ] )

    All arguments [B]: sequence scores, log-probs summed over tokens (or averaged: the caller's
    choice). Returns [B]. Its value while theta = ref is ln 2.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def npo_loss(token_logps, ref_token_logps, token_weights, beta):
    """Token-weighted NPO, ALLO's forgetting loss:

        -w_t log sigma( -beta log pi_theta(y_t)/pi_ref(y_t) )

    token_logps, ref_token_logps, token_weights [B,T] -> [B,T]; a weight of 0 takes the token out.
    ALLO divides the sum by the number of tokens with w_t != 0. Value while theta = ref: w_t ln 2.
    (Official NPO, Zhang et al. 2024, carries a factor 2/beta; the official ALLO code does not.)
    """
    ratio = token_logps - ref_token_logps
    return -token_weights * F.logsigmoid(-beta * ratio)


def useful_token_mask(token_logps, ref_token_logps, response_mask, fraction):
    """Which rejected tokens count in improving: the k of lowest log pi_theta(y_t)/pi_ref(y_t).

        k = max(1, floor(fraction * n)),  n the response's own tokens, EOS included (departure b)

    These are the tokens that forgetting and training already push down: pushing on is useful; the
    others are noise that chosen responses share. Tokens tied with the k-th are kept as well, so at
    theta = ref, where all ratios are 0, every token counts and the loss is plain DPO's.

    token_logps, ref_token_logps [B,T] float, response_mask [B,T] bool -> bool [B,T]. No gradient
    passes through.
    """
    ratio = (token_logps - ref_token_logps).detach().masked_fill(~response_mask, math.inf)
    n = response_mask.sum(-1)  # [B]
    share = Fraction(fraction).limit_denominator(10**6)  # 0.3 * 10 is 3, not 2.9999999999999996
    k = (n * share.numerator // share.denominator).clamp(min=1)
    kth = ratio.sort(-1).values.gather(-1, (k - 1)[:, None])  # [B,1]
    return (ratio <= kth) & response_mask


def rdpo_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, beta, alpha):
    """R-DPO (Park et al. 2024, arXiv 2403.19159), for the reward minus alpha |y|:

        -log sigma( beta [ log pi_theta(y+)/pi_ref(y+) - log pi_theta(y-)/pi_ref(y-) ]
                    + alpha (|y+| - |y-|) )

    Solved for the policy the margin gains what the reward loses: a longer y+ is pushed less.
    Log-probs summed, lengths in tokens, all [B] -> [B].
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin + alpha * (n_chosen - n_rejected))


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """IPO (Azar et al. 2023, eq. 17), whose margin stops growing at 1/(2 beta):

        ( [ log pi_theta(y+)/pi_ref(y+) - log pi_theta(y-)/pi_ref(y-) ] - 1/(2 beta) )^2

    Log-probs averaged over tokens, [B] -> [B]. While theta = ref: 1/(4 beta^2).
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def simpo_loss(chosen, rejected, beta, gamma):
    """SimPO (Meng et al. 2024, eq. 6), which has no pi_ref:

        -log sigma( beta [log pi(y+) - log pi(y-)] - gamma )

    Log-probs averaged over tokens, [B] -> [B].
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def bco_loss(chosen, rejected, ref_chosen, ref_rejected, beta, delta):
    """BCO (Jung et al. 2024): tells y+ from y- by the reward r(y) = beta log pi_theta(y)/pi_ref(y).

        -log sigma(r(y+) - delta) - log sigma(-(r(y-) - delta))

    delta: the rewards' mean so far, (E r(y+) + E r(y-)) / 2. Log-probs summed, [B] -> [B]. While
    theta = ref: 2 ln 2.
    """
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(up - delta) - F.logsigmoid(delta - down)
