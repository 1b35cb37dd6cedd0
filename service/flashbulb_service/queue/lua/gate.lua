-- Pause, drain or open a model. ARGV: model, 'paused' | 'draining' | '' (open), most gates. Returns 1, 0 when full.

local model, gate = ARGV[1], ARGV[2]
if gate == '' then
  call('HDEL', key('gates'), model)
elseif not gate_of(model) and call('HLEN', key('gates')) >= tonumber(ARGV[3]) then
  return 0
else
  call('HSET', key('gates'), model, gate)
end
if gate == 'paused' then
  call('DEL', key('wake', model))
else
  settle(model)
end
return 1
