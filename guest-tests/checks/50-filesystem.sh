# A file system made, mounted, filled, unmounted, checked, mounted again and compared.
. /lib.sh
names="make mount fill check compare"
size=96 # MiB
need_disk $((size * MIB)) $names
type=ext4
command -v mkfs.ext4 >/dev/null || type=ext2
if ! grep -qw ext4 /proc/filesystems && ! grep -qw $type /proc/filesystems; then
	skip_all "the kernel has no ext4: its module is not in the initramfs" $names
fi
grep -qw $type /proc/filesystems || type=ext4
plan 5

step() { # name command...: later steps make no sense after a failure
	name=$1
	shift
	if [ $failed -gt 0 ]; then
		skip "$name" "an earlier step failed"
		return
	fi
	text=$("$@" 2>&1)
	status=$?
	if [ $status -eq 0 ] || [ $status -eq 4 ]; then
		outcome $status "$name" "$text"
	else
		fail "$name" "status $status: $text"
	fi
}

make() {
	if command -v mkfs.ext4 >/dev/null; then
		# Without identifiers given, mkfs waits seconds for the random numbers of a machine that has just started.
		read -r uuid </proc/sys/kernel/random/uuid
		mkfs.ext4 -q -F -b 4096 -U "$uuid" -E hash_seed="$uuid" "$DISK" ${size}M && echo "ext4, $size MiB"
	else
		mke2fs -b 4096 "$DISK" $((size * 256)) >/dev/null && echo "ext2 by busybox, $size MiB"
	fi
}
seed=$(awk '{print $1 * 100}' /proc/uptime)
fill() {
	mkdir /mnt/disk/tree && guest files-make /mnt/disk/tree "$seed" && umount /mnt/disk
}
check() {
	if ! command -v fsck.ext4 >/dev/null; then
		echo "the initramfs holds no e2fsck"
		return 4
	fi
	fsck.ext4 -f -n "$DISK" >/run/fsck 2>&1
	status=$?
	[ $status -eq 4 ] && status=1 # "errors left", which here would read as a skip
	tail -n 1 /run/fsck
	return $status
}
compare() {
	mount -t $type -o ro "$DISK" /mnt/disk || return
	guest files-compare /mnt/disk/tree "$seed"
	status=$?
	umount /mnt/disk && return $status
}

mkdir -p /mnt/disk
step make make
step mount mount -t $type "$DISK" /mnt/disk
step fill fill
step check check
step compare compare
finish
