# Shared virtual addressing: pages that come late, from swap, or in numbers. Swap space is memory, compressed.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" pressure
SWAP=/dev/zram0
if [ -b $SWAP ]; then
	echo 64M >/sys/block/zram0/disksize
	mkswap $SWAP >/dev/null && swapon $SWAP
fi
guest sva pressure >&3
status=$?
[ -b $SWAP ] && swapoff $SWAP
exit $status
