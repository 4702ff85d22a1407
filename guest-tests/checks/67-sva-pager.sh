# Shared virtual addressing: pages that a program of the guest brings, late or never.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" pager
guest sva pager >&3
