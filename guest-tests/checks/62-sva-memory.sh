# Shared virtual addressing: jobs of the DMA engine on every kind of memory that a process has.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" memory
guest sva memory >&3
