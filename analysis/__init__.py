"""From a folder of runs to a verdict: collect, test, judge, report."""
