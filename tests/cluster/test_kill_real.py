"""A real node that is killed, and what becomes of its people and of what was on its way to them.

More of this kind, which takes longer, is in test_death_real.py and test_split_real.py."""

from tests.harness.field import A_DOZEN, LOUD, PATIENCE


async def test_after_a_kill_every_contact_hears_once_and_nothing_on_its_way_is_lost(field):
    scene = await field(timeout=LOUD)
    juliet, romeo, nurse = scene.people
    scene.ledger.begin([romeo, nurse], every=0.1, to=[juliet])
    before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}
    await scene.ledger.until(lambda: len(scene.ledger.arrived(romeo, juliet)) > 20, "they chat")

    scene.mark()
    await scene.run(scene.cluster[0].kill)
    await scene.ledger.until(lambda: not (romeo.sees(juliet) or nurse.sees(juliet)), "juliet is gone", PATIENCE)
    for node in scene.cluster.nodes[1:]:
        assert await scene.run(scene.rows, node, scene.cluster[0]) == 0
    await juliet.drop()
    await juliet.come(scene.cluster[1])
    await scene.ledger.until(lambda: all(scene.ledger.truth()), "juliet is back", PATIENCE)

    for person in (romeo, nurse):
        assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
    await scene.accounts()
    for node in scene.cluster.nodes[1:]:
        await scene.until_told(
            node, 'node down node=xmppd@node01 .* reason="its process has gone"', "contacts told of lost sessions"
        )
        assert "contacts told of lost sessions sessions=1 told=1" in scene.told(node)
        assert len(scene.told(node)) <= A_DOZEN, scene.told(node)
