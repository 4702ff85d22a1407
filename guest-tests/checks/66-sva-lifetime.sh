# Shared virtual addressing: processes, bindings and drivers that end in the middle of jobs.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" lifetime
guest sva lifetime >&3
