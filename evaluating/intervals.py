"""95% intervals and two-sided p values."""

import math

Z = 1.959964  # of 95%, the normal distribution's


def wilson(share, n):
    """Wilson's interval of a share of n -> (low, high). scipy's takes whole counts; here a tie is half a win."""
    middle, half = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def student(values):
    """values [n] -> (half the interval of their mean, p of a mean of 0), by Student's t with n - 1 degrees; no interval
    where all are equal."""
    from scipy.stats import ttest_1samp

    if len(set(values)) == 1:
        return 0.0, float(not values[0])
    found = ttest_1samp(values, 0)
    low, high = found.confidence_interval()
    return float(high - low) / 2, float(found.pvalue)


def paired_bootstrap(differences, resamples=9999):
    """The same items under two systems, their differences [n] -> (mean, (low, high), p): p is twice the share of
    resampled means on the other side of 0, at least 2 / (resamples + 1). Equal differences cannot be resampled: they
    have the sign test's p."""
    import numpy as np
    from scipy.stats import bootstrap

    middle = sum(differences) / len(differences)
    if len(set(differences)) == 1:
        return middle, (middle, middle), min(1.0, 2 * 0.5 ** len(differences)) if middle else 1.0
    found = bootstrap((differences,), np.mean, n_resamples=resamples, method="percentile", random_state=0)
    means, (low, high) = found.bootstrap_distribution, found.confidence_interval
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return middle, (float(low), float(high)), min(1.0, 2 * (1 + int(beyond)) / (1 + resamples))


def intercept(x, y):
    """Least squares of y [n] on x [n] -> (the intercept, (low, high), p)."""
    from scipy.stats import linregress, t

    fit, freedom = linregress(x, y), len(x) - 2
    middle, error = float(fit.intercept), float(fit.intercept_stderr)
    half = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(middle) / error, freedom)) if error else float(not middle)
    return middle, (middle - half, middle + half), p


def holm(values):
    """p values -> the same by Holm's correction, in their order."""
    import numpy as np

    order = np.argsort(values, stable=True)
    times = np.arange(len(values), 0, -1)
    corrected = np.maximum.accumulate(times * np.asarray(values)[order]).clip(max=1)
    return corrected[np.argsort(order)]
