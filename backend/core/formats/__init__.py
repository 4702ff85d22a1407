"""Page-table formats of the C core: one header each, over contract.h. Nothing here is Python."""
