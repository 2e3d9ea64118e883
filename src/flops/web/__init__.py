"""The GUI: pages for browsers, served beside the REST API and made from nothing but its answers.

`Web` makes an ASGI application. It calls the API within the process, in the name of whoever is signed in, so
a page can never show or do more than that person's token allows. Pages are rendered here and work without
any script; a small script of our own keeps them live over server-sent events. Nothing is loaded from
elsewhere.
"""

from flops.web.app import Web

__all__ = ["Web"]
