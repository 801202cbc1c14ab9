//! Layers as builders make them, and as an attacker would.
//!
//! These tests change owners, so they need root, as the agent itself does.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

/// A layer in the making.
struct TestLayer(Builder<Vec<u8>>);

impl TestLayer {
    fn new() -> TestLayer {
        TestLayer(Builder::new(Vec::new()))
    }

    /// An entry whose name and link go into the header as they are, unchecked.
    fn raw(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> TestLayer {
        let mut header = Header::new_ustar();
        let bytes = header.as_mut_bytes();
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> TestLayer {
        self.raw(EntryType::Regular, name, "", content.as_bytes())
    }

    fn dir(self, name: &str) -> TestLayer {
        self.raw(EntryType::Directory, name, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> TestLayer {
        self.raw(EntryType::Symlink, name, target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> TestLayer {
        self.raw(EntryType::Link, name, target, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> TestLayer {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

struct Unpacked {
    folder: tempfile::TempDir,
    tree: RootTree,
}

impl Unpacked {
    fn new(limits: Limits) -> Unpacked {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::write(folder.path().join("outside"), "untouched").unwrap();
        let tree = RootTree::new(&folder.path().join("root"), limits, Arc::default()).unwrap();
        Unpacked { folder, tree }
    }

    fn of(layers: impl IntoIterator<Item = TestLayer>) -> Result<Unpacked, LayerError> {
        let mut unpacked = Unpacked::new(Limits::default());
        for layer in layers {
            unpacked.tree.apply(&layer.bytes()[..])?;
        }
        unpacked.tree.finish()?;
        Ok(unpacked)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("root").join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    fn assert_outside_untouched(&self) {
        let outside: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(outside.len(), 2, "{outside:?}");
        assert_eq!(fs::read_to_string(self.folder.path().join("outside")).unwrap(), "untouched");
    }
}

#[track_caller]
fn refused(layers: impl IntoIterator<Item = TestLayer>) -> LayerError {
    let mut unpacked = Unpacked::new(Limits::default());
    let outcome = layers.into_iter().try_for_each(|layer| unpacked.tree.apply(&layer.bytes()[..]));
    unpacked.assert_outside_untouched();
    outcome.expect_err("the layer was accepted")
}

#[test]
fn ownership_modes_times_and_kinds_are_kept() {
    let layer = TestLayer::new()
        .dir("bin")
        .raw(EntryType::Regular, "bin/su", "", b"program")
        .symlink("bin/sh", "../../usr/bin/dash")
        .hard_link("bin/su2", "./bin/su")
        .raw(EntryType::Fifo, "bin/pipe", "", b"")
        .file("implied/parent/file", "x");
    let unpacked = Unpacked::of([layer]).unwrap();
    let su = fs::metadata(unpacked.path("bin/su")).unwrap();
    assert_eq!((su.uid(), su.gid(), su.mode() & 0o7777), (1000, 1001, 0o644));
    assert_eq!((su.mtime(), su.nlink()), (1_700_000_000, 2));
    assert_eq!(fs::metadata(unpacked.path("bin")).unwrap().mtime(), 1_700_000_000);
    assert_eq!(fs::read_link(unpacked.path("bin/sh")).unwrap(), Path::new("../../usr/bin/dash"));
    assert_eq!(fs::symlink_metadata(unpacked.path("bin/sh")).unwrap().uid(), 1000);
    let pipe = fs::symlink_metadata(unpacked.path("bin/pipe")).unwrap();
    assert!(pipe.file_type().is_fifo());
    assert_eq!(pipe.mode() & 0o7777, 0o644);
    let implied = fs::metadata(unpacked.path("implied/parent")).unwrap();
    assert_eq!((implied.uid(), implied.mode() & 0o7777, implied.mtime()), (0, 0o755, 0));
}

#[test]
fn set_id_bits_and_capabilities_survive_the_change_of_owner() {
    // cap_net_bind_service=ep, as the kernel stores it (revision 2).
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut header = Header::new_ustar();
    header.set_path("ping").unwrap();
    header.set_mode(0o4755);
    header.set_uid(7);
    header.set_gid(8);
    header.set_size(0);
    header.set_cksum();
    let mut layer = TestLayer::new().pax(&[("SCHILY.xattr.security.capability", &capability)]);
    layer.0.append(&header, &b""[..]).unwrap();
    let unpacked = Unpacked::of([layer]).unwrap();
    let metadata = fs::metadata(unpacked.path("ping")).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (7, 0o4755));
    let mut value = [0; 64];
    let bytes = fs_getxattr(&unpacked.path("ping"), "security.capability", &mut value);
    assert_eq!(&value[..bytes], capability);
}

fn fs_getxattr(path: &Path, name: &str, value: &mut [u8]) -> usize {
    rustix::fs::getxattr(path, name, value).unwrap()
}

#[test]
fn later_layers_replace_and_remove() {
    let base = TestLayer::new()
        .dir("etc")
        .file("etc/keep", "1")
        .file("etc/change", "1")
        .file("etc/gone", "1")
        .dir("var/cache")
        .file("var/cache/old", "1")
        .dir("dir-to-file")
        .file("dir-to-file/x", "1")
        .file("file-to-dir", "1");
    let next = TestLayer::new()
        .file("etc/change", "2")
        .file("etc/.wh.gone", "")
        .file("var/cache/new", "2")
        .file("var/cache/.wh..wh..opq", "")
        .file("dir-to-file", "2")
        .dir("file-to-dir")
        .file("file-to-dir/x", "2")
        .file(".wh.never-was", "");
    let unpacked = Unpacked::of([base, next]).unwrap();
    assert_eq!((unpacked.text("etc/keep").as_str(), unpacked.text("etc/change").as_str()), ("1", "2"));
    assert!(!unpacked.exists("etc/gone") && !unpacked.exists("etc/.wh.gone"));
    assert!(!unpacked.exists("var/cache/old"));
    assert_eq!(unpacked.text("var/cache/new"), "2");
    assert_eq!((unpacked.text("dir-to-file").as_str(), unpacked.text("file-to-dir/x").as_str()), ("2", "2"));
}

#[test]
fn whiteouts_spare_what_their_own_layer_made() {
    let base = TestLayer::new().file("d/sub/old", "1").file("d/old", "1").file("e/f", "1");
    let next = TestLayer::new()
        .file("d/sub/new", "2")
        .file("e/f", "2")
        .file("e/.wh.f", "")
        .file("d/.wh..wh..opq", "");
    let unpacked = Unpacked::of([base, next]).unwrap();
    assert!(!unpacked.exists("d/old") && !unpacked.exists("d/sub/old"));
    assert_eq!((unpacked.text("d/sub/new").as_str(), unpacked.text("e/f").as_str()), ("2", "2"));
}

#[test]
fn an_opaque_root_empties_it() {
    let base = TestLayer::new().file("a/b", "1").file("c", "1");
    let unpacked = Unpacked::of([base, TestLayer::new().file(".wh..wh..opq", "").file("d", "2")]).unwrap();
    assert!(!unpacked.exists("a") && !unpacked.exists("c") && unpacked.exists("d"));
}

#[test]
fn replacing_a_file_leaves_its_other_names_alone() {
    let base = TestLayer::new().file("a", "1").hard_link("b", "a");
    let unpacked = Unpacked::of([base, TestLayer::new().file("a", "2")]).unwrap();
    assert_eq!((unpacked.text("a").as_str(), unpacked.text("b").as_str()), ("2", "1"));
}

#[test]
fn an_earlier_layers_link_gives_way_to_a_directory() {
    let base = TestLayer::new().file("usr/lib/old", "1").symlink("lib", "usr/lib").symlink("out", "/");
    let next = TestLayer::new().file("lib/new", "2").file("out/new", "2").file("out/.wh.usr", "");
    let unpacked = Unpacked::of([base, next]).unwrap();
    assert!(fs::symlink_metadata(unpacked.path("lib")).unwrap().is_dir());
    assert_eq!((unpacked.text("lib/new").as_str(), unpacked.text("out/new").as_str()), ("2", "2"));
    assert!(unpacked.exists("usr/lib/old"));
    unpacked.assert_outside_untouched();
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["../outside", "a/../../outside", "/../outside", ".wh...", "a/.wh..."] {
        assert!(matches!(refused([TestLayer::new().file(name, "evil")]), LayerError::Path { .. }), "{name}");
    }
    let climbing = refused([TestLayer::new().hard_link("x", "../outside")]);
    assert!(matches!(climbing, LayerError::Path { .. }));
}

#[test]
fn links_are_never_followed() {
    let through = |error| assert!(matches!(error, LayerError::ThroughNonDirectory { .. }), "{error:?}");
    for target in ["..", "/", "/tmp", "."] {
        through(refused([TestLayer::new().symlink("x", target).file("x/outside", "evil")]));
        through(refused([TestLayer::new().symlink("x", target).dir("x/y")]));
        through(refused([TestLayer::new().symlink("x", target).symlink("x/y", "z")]));
        through(refused([TestLayer::new()
            .symlink("x", target)
            .hard_link("y", "x")
            .file("y/outside", "evil")]));
    }
    // A hard link to something reached through a link.
    let error = refused([TestLayer::new().symlink("x", "..").hard_link("y", "x/outside")]);
    assert!(matches!(error, LayerError::HardLink { .. }), "{error:?}");
    // Writing to a link's own name replaces the link.
    let unpacked =
        Unpacked::of([TestLayer::new().symlink("x", "../outside").file("x", "a file now")]).unwrap();
    assert_eq!(unpacked.text("x"), "a file now");
    unpacked.assert_outside_untouched();
    // A directory's attributes are not those of what a link points to.
    let unpacked = Unpacked::of([TestLayer::new().symlink("x", ".."), TestLayer::new().dir("x")]).unwrap();
    assert!(fs::symlink_metadata(unpacked.path("x")).unwrap().is_dir());
    // Neither a whiteout nor an opaque mark reaches through a link.
    let unpacked = Unpacked::of([
        TestLayer::new().symlink("x", ".."),
        TestLayer::new().file("y", "").file("z/.wh..wh..opq", ""),
        TestLayer::new().raw(EntryType::Regular, "x/.wh.outside", "", b""),
    ])
    .unwrap();
    unpacked.assert_outside_untouched();
}

#[test]
fn hard_links_need_an_earlier_file() {
    for layer in [
        TestLayer::new().hard_link("a", "missing"),
        TestLayer::new().hard_link("a", "a"),
        TestLayer::new().dir("d").hard_link("a", "d"),
        TestLayer::new().hard_link("a", "/"),
        TestLayer::new().dir("d").file("d/f", "x").hard_link("d", "d/f"),
    ] {
        assert!(matches!(refused([layer]), LayerError::HardLink { .. }));
    }
}

#[test]
fn device_nodes_and_unknown_entries_are_refused() {
    for kind in [EntryType::Char, EntryType::Block, EntryType::GNUSparse, EntryType::new(b'V')] {
        let error = refused([TestLayer::new().raw(kind, "dev/x", "", b"")]);
        assert!(matches!(error, LayerError::Forbidden { .. }), "{kind:?}: {error:?}");
    }
    let error = refused([TestLayer::new().file("./", "the root as a file")]);
    assert!(matches!(error, LayerError::Forbidden { .. }), "{error:?}");
}

#[test]
fn foreign_attributes_are_refused() {
    for name in ["trusted.overlay.opaque", "security.selinux", "system.posix_acl_access", "user"] {
        let key = format!("SCHILY.xattr.{name}");
        let error = refused([TestLayer::new().pax(&[(&key, b"y")]).file("a", "")]);
        assert!(matches!(error, LayerError::Xattr { .. }), "{name}: {error:?}");
    }
}

#[test]
fn bombs_are_bounded() {
    let small =
        Limits { unpacked_bytes_max: 64 << 10, entries_max: 40, name_bytes_max: 2000, ..Limits::default() };
    let too_large = |layer: TestLayer, expected: &str| {
        let mut unpacked = Unpacked::new(small);
        match unpacked.tree.apply(&layer.bytes()[..]) {
            Err(LayerError::TooLarge { what, .. }) => assert_eq!(what, expected),
            other => panic!("{other:?}"),
        }
    };
    too_large(TestLayer::new().raw(EntryType::Regular, "zeros", "", &[0; 100 << 10]), "bytes");
    let many = (0..41).fold(TestLayer::new(), |layer, n| layer.file(&format!("f{n}"), ""));
    too_large(many, "entries");
    // One short entry with many implied directories counts each.
    too_large(TestLayer::new().file(&"d/".repeat(45).replace("/d", "/e"), ""), "entries");
    let names = (0..30).fold(TestLayer::new(), |layer, n| layer.file(&format!("{n:090}"), ""));
    too_large(names, "bytes of names");
    // What follows the archive's end counts too, and so does what earlier layers used.
    let mut unpacked = Unpacked::new(small);
    let half = TestLayer::new().raw(EntryType::Regular, "half", "", &[0; 40 << 10]).bytes();
    unpacked.tree.apply(&half[..]).unwrap();
    assert!(matches!(unpacked.tree.apply(&half[..]), Err(LayerError::TooLarge { .. })));
    let trailing = TestLayer::new().file("a", "").bytes();
    let endless = trailing.chain(std::io::repeat(0));
    assert!(matches!(Unpacked::new(small).tree.apply(endless), Err(LayerError::TooLarge { .. })));
}

#[test]
fn truncated_archives_are_refused() {
    let bytes = TestLayer::new().raw(EntryType::Regular, "f", "", &[1; 5000]).bytes();
    for cut in [1, 511, 513, 512 + 4999] {
        let outcome = Unpacked::new(Limits::default()).tree.apply(&bytes[..cut]);
        assert!(matches!(outcome, Err(LayerError::Read(_))), "cut at {cut}: {outcome:?}");
    }
}

#[test]
fn cancellation_stops_at_the_next_entry() {
    let mut unpacked = Unpacked::new(Limits::default());
    unpacked.tree.cancelled.store(true, Ordering::Relaxed);
    let outcome = unpacked.tree.apply(&TestLayer::new().file("a", "x").bytes()[..]);
    assert!(matches!(outcome, Err(LayerError::Cancelled)));
    assert!(!unpacked.exists("a"));
}

#[test]
fn account_files_are_read_inside_the_root_only() {
    let linked = TestLayer::new()
        .file("nix/store/passwd", "web:x:5:6::/:\n")
        .symlink("etc/passwd", "/nix/store/passwd")
        .symlink("etc/group", "/../../../outside");
    let unpacked = Unpacked::of([linked]).unwrap();
    let accounts = unpacked.tree.accounts().unwrap();
    assert_eq!(accounts.resolve("web").unwrap().uid, 5);
    // The link climbs no higher than the root, where there is no such file.
    assert!(accounts.group.is_empty());
    let pipe = TestLayer::new().raw(EntryType::Fifo, "etc/passwd", "", b"");
    assert!(Unpacked::of([pipe]).unwrap().tree.accounts().is_err());
    let huge = TestLayer::new().raw(EntryType::Regular, "etc/passwd", "", &vec![b'a'; (1 << 20) + 1]);
    assert!(Unpacked::of([huge]).unwrap().tree.accounts().is_err());
}

#[derive(Debug, Clone)]
struct Step {
    kind: u8,
    name: String,
    link: String,
}

fn step() -> impl Strategy<Value = Step> {
    let name = "(a|b|c|\\.\\.|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq)(/(a|b|\\.\\.|\\.wh\\.b|\\.wh\\.\\.wh\\.\\.opq)){0,3}";
    let link = "(a|b|\\.\\.|/|outside)(/(a|b|\\.\\.|outside)){0,3}";
    (0u8..5, name, link).prop_map(|(kind, name, link)| Step { kind, name, link })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever an archive does, nothing outside the root is made, changed or removed.
    #[test]
    fn i14_no_archive_reaches_outside(layers in proptest::collection::vec(proptest::collection::vec(step(), 1..12), 1..4)) {
        let mut unpacked = Unpacked::new(Limits::default());
        for steps in layers {
            let mut layer = TestLayer::new();
            for Step { kind, name, link } in steps {
                layer = match kind {
                    0 => layer.file(&name, "evil"),
                    1 => layer.dir(&name),
                    2 => layer.symlink(&name, &link),
                    3 => layer.hard_link(&name, &link),
                    _ => layer.raw(EntryType::Fifo, &name, "", b""),
                };
            }
            if unpacked.tree.apply(&layer.bytes()[..]).is_err() {
                break;
            }
        }
        let _ = unpacked.tree.accounts();
        let _ = unpacked.tree.finish();
        unpacked.assert_outside_untouched();
    }
}
