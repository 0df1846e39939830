import asyncio
from ale.testing.clock import run
from ale.bus import Bus
from ale.actor import Actor
from ale.supervisor import Supervisor
from ale.wire import *
class Tick(Message): n:int=0
class Total(Message): value:int
class Get(Request[Total]): pass
class Counter(Actor):
    async def started(self): self.seen=0
    async def receive(self,m):
        match m:
            case Tick(): self.seen+=1
            case Get(): return Total(value=self.seen)
            case _: await super().receive(m)
def test_it():
    async def s():
        bus=Bus(plain=True)
        async with Supervisor(bus) as sup:
            await sup.start(Counter("c",capacity=3))
            for i in range(10): await bus.tell("c",Tick(n=i),deadline_s=1)
            t=await bus.ask("c",Get(),deadline_s=1)
            assert t.value==10
            print(bus.waits(), bus.statistics())
        return bus.statistics().actors["c"]
    print(run(s()))
