# The DMA engine on kernel mappings: its driver makes them and compares the bytes.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" kernel-mappings
guest sva kernel >&3
