use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use latchkey_domain::id::RunId;
use latchkey_domain::policy::Phase;
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop_assert_eq, proptest};

use super::{AppendError, Options, Progress, RunLogs, State};

const PLAN: Phase = Phase::Plan;

fn run(number: u8) -> RunId {
    RunId::from_bytes([number; 16])
}

fn open(directory: &Path) -> RunLogs {
    RunLogs::open(Options::new(directory)).unwrap()
}

async fn append(logs: &RunLogs, offset: u64, bytes: &[u8]) -> Result<u64, AppendError> {
    logs.append(run(1), PLAN, offset, bytes.to_vec()).await
}

async fn whole(logs: &RunLogs) -> Vec<u8> {
    logs.read(run(1), PLAN, 0, usize::MAX).await.unwrap()
}

#[tokio::test]
async fn the_next_writer_begins_behind_what_one_who_went_away_left() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    append(&logs, 0, b"one\n").await.unwrap();
    // As an append whose caller goes away before the sync.
    let log = logs.log(run(1), PLAN);
    log.write(4, b"two\n".to_vec(), u64::MAX).await.unwrap();
    assert_eq!(logs.progress(run(1), PLAN).await.unwrap().length, 4);
    assert_eq!(logs.settle(run(1), PLAN).await.unwrap(), 8);
    assert_eq!(append(&logs, 8, b"three\n").await.unwrap(), 14);
    assert_eq!(whole(&logs).await, b"one\ntwo\nthree\n");
    assert_eq!(logs.settle(run(2), PLAN).await.unwrap(), 0);
}

#[tokio::test]
async fn a_repeat_is_acknowledged_and_a_gap_refused() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    assert_eq!(append(&logs, 0, b"one\n").await.unwrap(), 4);
    assert_eq!(append(&logs, 0, b"one\n").await.unwrap(), 4);
    assert_eq!(append(&logs, 4, b"two\n").await.unwrap(), 8);
    assert_eq!(append(&logs, 1, b"ne\ntw").await.unwrap(), 8);
    assert_eq!(append(&logs, 2, b"e\ntwo\nthree\n").await.unwrap(), 14);
    assert_eq!(append(&logs, 14, b"").await.unwrap(), 14);
    let error = append(&logs, 15, b"x").await.unwrap_err();
    assert!(matches!(error, AppendError::Gap { expected: 14 }));
    let error = append(&logs, u64::MAX, b"x").await.unwrap_err();
    assert!(matches!(error, AppendError::Gap { expected: 14 }));
    assert_eq!(whole(&logs).await, b"one\ntwo\nthree\n");
}

#[tokio::test]
async fn other_bytes_than_those_written_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    append(&logs, 0, b"abcdef").await.unwrap();
    let error = append(&logs, 2, b"cdXfgh").await.unwrap_err();
    assert!(matches!(error, AppendError::Diverges { at: 4 }));
    assert_eq!(whole(&logs).await, b"abcdef");
}

#[tokio::test]
async fn a_log_has_a_limit_and_no_zero_bytes() {
    let root = tempfile::tempdir().unwrap();
    let options = Options { limit: 10, ..Options::new(root.path()) };
    let logs = RunLogs::open(options).unwrap();
    append(&logs, 0, b"12345678").await.unwrap();
    let error = append(&logs, 8, b"901").await.unwrap_err();
    assert!(matches!(error, AppendError::TooLarge { limit: 10 }));
    let error = append(&logs, 8, b"9\0").await.unwrap_err();
    assert!(matches!(error, AppendError::ZeroByte { at: 9 }));
    assert_eq!(append(&logs, 6, b"7890").await.unwrap(), 10);
}

#[tokio::test]
async fn a_finished_log_takes_repeats_only() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    append(&logs, 0, b"all").await.unwrap();
    for logs in [&logs, &logs, &open(root.path())] {
        assert_eq!(logs.finish(run(1), PLAN).await.unwrap(), 3);
        assert_eq!(append(logs, 1, b"ll").await.unwrap(), 3);
        let error = append(logs, 1, b"lll").await.unwrap_err();
        assert!(matches!(error, AppendError::Finished { length: 3 }));
        let expect = Progress { length: 3, state: State::Finished };
        assert_eq!(logs.progress(run(1), PLAN).await.unwrap(), expect);
    }
    // The other phase is another log, and an empty one can be finished.
    assert_eq!(logs.finish(run(1), Phase::Apply).await.unwrap(), 0);
    let error = logs.append(run(1), Phase::Apply, 0, b"x".to_vec()).await.unwrap_err();
    assert!(matches!(error, AppendError::Finished { length: 0 }));
}

#[tokio::test]
async fn after_a_restart_the_file_is_the_truth() {
    let root = tempfile::tempdir().unwrap();
    append(&open(root.path()), 0, b"whole\ntor").await.unwrap();
    let logs = open(root.path());
    let expect = Progress { length: 9, state: State::Growing };
    assert_eq!(logs.progress(run(1), PLAN).await.unwrap(), expect);
    assert_eq!(append(&logs, 6, b"torn\n").await.unwrap(), 11);
    assert_eq!(whole(&logs).await, b"whole\ntorn\n");
}

#[tokio::test]
async fn what_a_lost_write_left_is_cut_off() {
    let root = tempfile::tempdir().unwrap();
    append(&open(root.path()), 0, b"durable\n").await.unwrap();
    let path = root.path().join(run(1).to_string()).join("plan.log");
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"late", 600_000).unwrap();
    let logs = open(root.path());
    assert_eq!(whole(&logs).await, b"durable\n");
    assert_eq!(append(&logs, 8, b"again\n").await.unwrap(), 14);
}

#[tokio::test]
async fn reading_creates_nothing() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    assert_eq!(whole(&logs).await, b"");
    assert_eq!(logs.progress(run(1), PLAN).await.unwrap(), Progress::default());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn any_part_can_be_read() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    append(&logs, 0, b"0123456789").await.unwrap();
    for (offset, max, expect) in
        [(0, 3, "012"), (3, 3, "345"), (8, 9, "89"), (10, 1, ""), (99, 1, ""), (0, 0, "")]
    {
        let read = logs.read(run(1), PLAN, offset, max).await.unwrap();
        assert_eq!(read, expect.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_all_bytes_and_the_end() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    let follower = tokio::spawn({
        let logs = logs.clone();
        let mut progress = logs.follow(run(1), PLAN).await.unwrap();
        async move {
            let mut seen = Vec::new();
            loop {
                let now = *progress.borrow_and_update();
                while (seen.len() as u64) < now.length {
                    seen.extend(logs.read(run(1), PLAN, seen.len() as u64, 1000).await.unwrap());
                }
                if now.state == State::Finished {
                    return seen;
                }
                progress.changed().await.unwrap();
            }
        }
    });
    let mut expect = Vec::new();
    for number in 0..200 {
        let line = format!("{{\"line\":{number}}}\n");
        append(&logs, expect.len() as u64, line.as_bytes()).await.unwrap();
        expect.extend_from_slice(line.as_bytes());
    }
    logs.finish(run(1), PLAN).await.unwrap();
    assert_eq!(follower.await.unwrap(), expect);
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_appends_are_all_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    let appends: Vec<_> = (0..100_u64)
        .map(|number| {
            let logs = logs.clone();
            // They may overtake each other: a gap is tried again, as a runner would.
            tokio::spawn(async move {
                loop {
                    match append(&logs, number * 4, b"abc\n").await {
                        Ok(length) => return assert!(length >= number * 4 + 4),
                        Err(AppendError::Gap { .. }) => tokio::task::yield_now().await,
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for append in appends {
        append.await.unwrap();
    }
    assert_eq!(whole(&logs).await, b"abc\n".repeat(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn few_files_stay_open_and_followers_are_not_forgotten() {
    let root = tempfile::tempdir().unwrap();
    let options = Options { open_files: 8, ..Options::new(root.path()) };
    let logs = RunLogs::open(options).unwrap();
    let mut followed = logs.follow(run(0), PLAN).await.unwrap();
    for round in 0..3_u64 {
        for number in 0..40 {
            logs.append(run(number), PLAN, round * 2, b"x\n".to_vec()).await.unwrap();
            assert!(logs.logs().len() <= 9);
        }
        assert_eq!(followed.borrow_and_update().length, round * 2 + 2);
    }
    let open = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| path.starts_with(root.path()))
        .count();
    assert!(open <= 9, "{open} files are open");
}

#[tokio::test]
async fn a_deleted_log_is_gone() {
    let root = tempfile::tempdir().unwrap();
    let logs = open(root.path());
    append(&logs, 0, b"secret\n").await.unwrap();
    logs.delete(run(1)).await.unwrap();
    logs.delete(run(1)).await.unwrap();
    assert_eq!(whole(&logs).await, b"");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any pieces, repeated and reopened in any way, make the one log or are refused.
    #[test]
    fn pieces_in_any_order_make_the_one_log(
        pieces in vec((0..60_u64, 1..30_usize, any::<bool>()), 1..40)
    ) {
        let canonical: Vec<u8> = (0..100).map(|index| b'a' + index % 26).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let root = tempfile::tempdir().unwrap();
            let mut logs = open(root.path());
            let mut length = 0;
            for (offset, size, reopen) in pieces {
                if reopen {
                    logs = open(root.path());
                }
                let start = usize::try_from(offset).unwrap();
                let piece = &canonical[start..start + size];
                let result = append(&logs, offset, piece).await;
                if offset > length {
                    let gap = matches!(result, Err(AppendError::Gap { expected }) if expected == length);
                    prop_assert_eq!(gap, true);
                } else {
                    length = length.max(offset + size as u64);
                    prop_assert_eq!(result.unwrap(), length);
                }
                prop_assert_eq!(&whole(&logs).await, &canonical[..usize::try_from(length).unwrap()]);
            }
            Ok(())
        })?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_logs_do_not_wait_for_each_other() {
    let root = tempfile::tempdir().unwrap();
    let logs = Arc::new(open(root.path()));
    let writers: Vec<_> = (0..20)
        .map(|number| {
            let logs = Arc::clone(&logs);
            tokio::spawn(async move {
                for index in 0..10_u64 {
                    logs.append(run(number), PLAN, index, b"x".to_vec()).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    for number in 0..20 {
        assert_eq!(logs.progress(run(number), PLAN).await.unwrap().length, 10);
    }
}
