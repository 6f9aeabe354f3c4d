"""The platform's web page: what there is on it, to be read in a browser.

:mod:`~yellowdog_ray.local.webpage.access` decides who may read it, and ``front`` puts it before the
platform's API. ``views`` says what is shown, out of ``parts``; ``happened`` says what happened; and ``app``
makes HTML of it. Only ``access`` and ``front`` are loaded before somebody opens the page.
"""
