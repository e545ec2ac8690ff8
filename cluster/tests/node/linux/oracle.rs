//! A child's memory and disk are its image's: digests computed by the guest against the image itself.

use std::os::unix::fs::FileExt;

use types::RegionKind;

use super::{PYTHON, eval, fork, node_with};

/// Reads the whole disk past the guest's cache, a megabyte at a time. The root is read-only, so nothing of it has changed.
const DIGEST_OF_DISK: &str = "
import os, mmap
def digest_of_disk():
    disk = os.open('/dev/vda', os.O_RDONLY | os.O_DIRECT)
    size = os.lseek(disk, 0, os.SEEK_END)
    buffer, total, at = mmap.mmap(-1, 1 << 20), hashlib.sha256(), 0
    while at < size:
        os.lseek(disk, at, os.SEEK_SET)
        count = os.readv(disk, [buffer])
        total.update(buffer[:count])
        at += count
    return f'{size} {total.hexdigest()}'
";

#[test]
fn real_memory_and_disk_of_a_child_are_its_images() {
    let node = node_with(PYTHON);
    let child = fork(&node, PYTHON, 1).remove(0);

    // Twelve megabytes in memory alone, hashed by the parent before it was frozen.
    let in_memory = "hashlib.sha256(open('/dev/shm/data','rb').read()).hexdigest(), open('/dev/shm/digest').read().split()[0]";
    let said = eval(&node, &child, in_memory);
    let digests: Vec<&str> = said.split('\'').filter(|part| part.len() == 64).collect();
    assert!(digests.len() == 2 && digests[0] == digests[1], "{said}");

    eval(&node, &child, DIGEST_OF_DISK);
    let said = eval(&node, &child, "digest_of_disk()");
    let (size, digest) = said.trim_matches('\'').split_once(' ').unwrap();
    // The same of the image's disk, from its file.
    let host = vm::Host::open().unwrap();
    let image = vm::image::load(&host, &node.path().join("data/images/py.img"), |_, _| {}).unwrap();
    // What the first child touched is recorded: for other hosts to fetch ahead.
    let recorded: u32 = image.working_set().iter().map(|run| run.count).sum();
    let all: u32 = image.regions().iter().map(|region| region.map().extent_count()).sum();
    assert!(recorded > 16 && recorded < all / 2, "{recorded} of {all} extents are recorded as touched");
    let disk = image.regions().iter().find(|region| region.kind() == RegionKind::Disk(0)).unwrap();
    let bytes = u64::from(disk.map().extent_count()) * types::EXTENT_SIZE;
    assert_eq!(size.parse::<u64>().unwrap(), bytes);
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    for extent in 0..bytes >> 16 {
        let mut buffer = [0; 1 << 16];
        assert!(disk.read_at(extent << 16, &mut buffer), "extent {extent} is not there");
        file.write_all_at(&buffer, extent << 16).unwrap();
    }
    let mut file = file;
    std::io::Seek::rewind(&mut file).unwrap();
    let sum = std::process::Command::new("sha256sum").stdin(file).output().unwrap();
    assert_eq!(String::from_utf8(sum.stdout).unwrap().split(' ').next(), Some(digest));
}
