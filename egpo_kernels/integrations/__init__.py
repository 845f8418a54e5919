"""One file per training stack, which is imported only when it is used; `heads` reads output layers for them."""
