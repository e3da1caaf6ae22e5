use super::*;
use crate::imageio::Access;
use crate::imageio::coverage::Coverage;
use crate::nbd::Export;

fn ticket(transfer: &str) -> Ticket {
    Ticket {
        id: TicketId::random().unwrap(),
        transfer: transfer.to_owned(),
        backup: "b".to_owned(),
        disk: "vda".to_owned(),
        access: Access::Read,
        size: 100,
        export: Export { socket: "/none".into(), name: String::new(), bitmap: None, changed_from: None },
        dirty: false,
        filename: None,
    }
}

fn added(tickets: &Tickets, transfer: &str) -> String {
    let ticket = ticket(transfer);
    let id = ticket.id.expose();
    tickets.add(ticket, SharedCoverage::new(Coverage::new(100)));
    id
}

#[tokio::test(start_paused = true)]
async fn a_ticket_lives_is_canceled_and_removed() {
    let tickets = Tickets::default();
    let (cut, progress) = (CancellationToken::new(), Progress::new());
    let id = added(&tickets, "t1");
    let other = added(&tickets, "t2");
    assert_eq!(tickets.begin("nonsense", &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
    assert!(!tickets.stats("t1").unwrap().ever_used);

    let operation = tickets.begin(&id, &cut, &progress).unwrap();
    assert_eq!(operation.ticket.transfer, "t1");
    tokio::time::advance(Duration::from_secs(5)).await;
    let stats = tickets.stats("t1").unwrap();
    assert_eq!((stats.active, stats.idle, stats.ever_used), (1, Duration::ZERO, true));
    let within = Duration::from_secs(5);
    assert!(!tickets.moves("t1", within), "nothing moved for 5 s");
    progress.moved();
    assert!(tickets.moves("t1", within));
    drop(operation);
    assert!(!tickets.moves("t1", within), "it ended");
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(tickets.stats("t1").unwrap().idle, Duration::from_secs(5));

    let operation = tickets.begin(&id, &cut, &progress).unwrap();
    tickets.end("t1", End::Canceled);
    assert!(cut.is_cancelled());
    assert_eq!(tickets.drained("t1", Duration::from_secs(1)).await, Drained::Reading);
    drop(operation);
    assert_eq!(tickets.drained("t1", Duration::from_secs(1)).await, Drained::Over);
    let canceled = Denied::Canceled { transfer: "t1".to_owned() };
    assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), canceled);

    tickets.end("t1", End::Removed);
    tickets.end("t1", End::Removed);
    assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
    assert_eq!(tickets.stats("t1"), None);
    assert!(tickets.begin(&other, &cut, &progress).is_ok());
}

#[tokio::test]
async fn removal_waits_for_what_runs_and_adding_again_revives() {
    let tickets = Tickets::default();
    let (cut, progress) = (CancellationToken::new(), Progress::new());
    let id = added(&tickets, "t1");
    let operation = tickets.begin(&id, &cut, &progress).unwrap();
    tickets.end("t1", End::Removed);
    assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
    let waiting = tickets.clone();
    let drained = tokio::spawn(async move { waiting.drained("t1", Duration::from_secs(5)).await });
    tokio::task::yield_now().await;
    drop(operation);
    assert_eq!(drained.await.unwrap(), Drained::Over);
    assert_eq!(tickets.stats("t1"), None);
    let id = added(&tickets, "t1");
    assert!(tickets.begin(&id, &CancellationToken::new(), &progress).is_ok());
}

#[tokio::test]
async fn canceled_transfers_are_remembered_up_to_a_bound() {
    let tickets = Tickets::default();
    for n in 0..=REMEMBERED {
        let transfer = n.to_string();
        added(&tickets, &transfer);
        tickets.end(&transfer, End::Canceled);
    }
    assert_eq!(tickets.lock().len(), REMEMBERED);
    assert_eq!(tickets.stats("0"), None);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_ticket_tells_what_may_be_written_still() {
    let tickets = Tickets::default();
    let (cut, progress) = (CancellationToken::new(), Progress::new());
    let id = added(&tickets, "t1");
    let within = Duration::from_secs(1);
    let reads = tickets.begin(&id, &cut, &progress).unwrap();
    let writes = tickets.begin(&id, &cut, &progress).unwrap();
    assert_eq!(writes.turn(0, 10).await, Ok(()));
    tickets.end("t1", End::Removed);
    assert_eq!(tickets.drained("t1", within).await, Drained::Writing);
    drop(writes);
    assert_eq!(tickets.drained("t1", within).await, Drained::Reading);
    drop(reads);
    assert_eq!(tickets.drained("t1", within).await, Drained::Over);

    let id = added(&tickets, "t1");
    let writes = tickets.begin(&id, &cut, &progress).unwrap();
    assert_eq!(writes.turn(0, 10).await, Ok(()));
    writes.doubt();
    drop(writes);
    tickets.end("t1", End::Removed);
    assert_eq!(tickets.drained("t1", within).await, Drained::Doubtful);
    assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
    let id = added(&tickets, "t1");
    let writes = tickets.begin(&id, &cut, &progress).unwrap();
    assert_eq!(writes.turn(20, 10).await, Err(Doubtful), "no new ticket makes it sure");
}

#[tokio::test(start_paused = true)]
async fn what_overlaps_is_written_in_turn() {
    let tickets = Tickets::default();
    let progress = Progress::new();
    let id = added(&tickets, "t1");
    let begin = |cut: &CancellationToken| tickets.begin(&id, cut, &progress).unwrap();
    let cuts = [CancellationToken::new(), CancellationToken::new()];
    let [first, second] = cuts.each_ref().map(begin);
    let moment = Duration::from_millis(1500);
    first.turn(0, 10).await.unwrap();
    for (start, length, waits) in [(10, 5, false), (0, 0, false), (9, 5, true), (0, 20, true), (3, 1, true)] {
        let turn = tokio::time::timeout(moment, second.turn(start, length)).await;
        assert_eq!(turn.is_err(), waits, "{start}+{length}");
        progress.moved();
    }
    first.received();
    assert!(tokio::time::timeout(Duration::from_secs(60), second.turn(0, 5)).await.is_err());
    assert!(!cuts[0].is_cancelled(), "it waits for the storage, and ends");
    let second = tokio::spawn(async move { second.turn(0, 5).await.map(|()| second) });
    tokio::task::yield_now().await;
    first.written();
    let second = second.await.unwrap().unwrap();
    let third = begin(&CancellationToken::new());
    assert!(tokio::time::timeout(Duration::from_secs(60), third.turn(0, 5)).await.is_err());
    assert!(cuts[1].is_cancelled(), "its client said nothing for a minute");
    drop(second);
}
